"""A large parameter in pieces: where each element moves by itself, a step needs memory for some of them at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ...int8_weight import Int8Weight
from .flat import FlatShard
from .full import FullShard
from .shard_range import spans

# Elements of a piece. What is made of them stays in a CPU's caches, which halves the time of a step; on other devices
# each piece costs launches.
ON_CPU, ELSEWHERE = 2**18, 2**24


def at_once(device: torch.device) -> int:
    """How many elements of a large tensor are worked on at a time: a multiple of 256."""
    return ON_CPU if device.type == "cpu" else ELSEWHERE


class PieceOfFull(FullShard):
    """Elements of a parameter that this process holds entirely."""

    def __init__(self, whole: FullShard, span: slice) -> None:
        super().__init__(whole.parameter.view(-1)[span], whole.position, whole.workspace)
        held = whole.held_gradient
        self._gradient = None if held is None else held.view(-1)[span]
        self._first: int = span.start
        self.maximize = whole.maximize

    @property
    def held_gradient(self) -> Tensor | None:
        return self._gradient

    @property
    def first_element(self) -> int:
        return self._first


class PieceOfFlat(FlatShard):
    """What this process holds of some elements of a parameter, which may be nothing."""

    def __init__(self, whole: FlatShard, span: slice) -> None:
        begin, end = span.start, span.stop
        bounds = tuple(min(max(bound, begin), end) - begin for bound in whole.held.bounds)
        held = replace(whole.held, shape=(end - begin,), bounds=bounds)
        self._first: int = begin + held.start
        own = slice(self._first - whole.held.start, self._first - whole.held.start + held.numel)
        super().__init__(whole.parameter[own], whole.held_gradient[own], held, whole.position, whole.workspace)
        self.maximize = whole.maximize

    @property
    def first_element(self) -> int:
        return self._first


def pieces_of(shard: FullShard, at_once: int) -> Iterator[tuple[FullShard, int, int]]:
    """``shard`` in pieces of at most ``at_once`` elements, each with the elements of ``shard.parameter`` that it has,
    from .. to. As many on every process that holds a part of it, in one order.

    A piece begins at a multiple of ``at_once`` of the whole parameter: blocks of 256 are in one piece on all processes.
    Of weights in 8 bits pieces are whole rows, too.
    """
    if isinstance(shard.parameter, Int8Weight):
        rows = math.lcm(shard.parameter.columns, 256)
        at_once = max(1, at_once // rows) * rows
    if isinstance(shard, FlatShard):
        bounds = shard.held.bounds
        size, most = bounds[-1], max(b - a for a, b in pairwise(bounds))
        kind: type[PieceOfFlat] | type[PieceOfFull] = PieceOfFlat
    else:
        size = most = shard.parameter.numel()
        kind = PieceOfFull
    if most <= at_once or not _is_flat(shard):
        yield shard, 0, shard.parameter.numel()
        return
    for span in spans(size, at_once):
        piece = kind(shard, span)  # type: ignore[arg-type]
        first = piece.first_element - shard.first_element
        yield piece, first, first + piece.parameter.numel()


def _is_flat(shard: FullShard) -> bool:
    """Whether elements lie one after the other in memory."""
    held = shard.held_gradient
    return shard.parameter.is_contiguous() and (held is None or held.is_contiguous())
