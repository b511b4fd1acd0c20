"""Measures of matrices, and their means over some of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from ..spectra import Measures
from .weight_pairs import Place


class Found(NamedTuple):
    """A matrix and its measures."""

    place: Place
    shape: tuple[int, ...]
    measures: Measures


class Row(NamedTuple):
    """Means over some matrices; the largest of largest angles."""

    name: str
    matrices: int
    means: dict[str, float]


def seed_of(name: str) -> int:
    """Of a matrix's control: another for each, the same in each run."""
    return zlib.crc32(name.encode())


def rows_of(found: Sequence[Found], of: str) -> list[Row]:
    """Means by ``layer`` or by ``kind``, in the order in which they come."""
    groups: dict[str, list[Measures]] = {}
    names = layer_names(found) if of == "layer" else {}
    for one in found:
        name: str = getattr(one.place, of)
        groups.setdefault(names.get(name, name), []).append(one.measures)
    return [row_of(name, measures) for name, measures in groups.items()]


def layer_names(found: Sequence[Found]) -> dict[str, str]:
    """Layers in their order, and what they are called: their numbers, after their stack where there are several."""
    layers = list(dict.fromkeys(one.place.layer for one in found))
    stacks = {layer.rpartition(" ")[0] for layer in layers if layer}
    return {layer: layer.rpartition(" ")[2] if len(stacks) == 1 else layer for layer in layers}


def row_of(name: str, measures: Sequence[Measures]) -> Row:
    """Of some matrices together."""
    means: dict[str, float] = {}
    for field in Measures._fields:
        if field != "similarity":
            values = [float(getattr(one, field)) for one in measures]
            means[field] = max(values) if field.endswith("_max") else math.fsum(values) / len(values)
    return Row(name, len(measures), means)
