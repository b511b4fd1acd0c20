"""Which layer a parameter belongs to: layers register when they are made, optimizers ask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakSet

from torch import Tensor, nn

_registered: WeakSet[nn.Module] = WeakSet()


class Part(NamedTuple):
    """A parameter by its place: ``name`` is its own in ``layer``."""

    layer: nn.Module
    name: str


def register(layer: nn.Module) -> None:
    """Let ``layer`` be found by the parameters it holds, whichever it holds when it is asked for: engines and loading
    replace them."""
    _registered.add(layer)


def parts_among(parameters: Iterable[Tensor]) -> dict[int, Part]:
    """Those of ``parameters`` that belong to a registered layer, by id."""
    held = {
        id(p): Part(layer, name) for layer in list(_registered) for name, p in layer.named_parameters(recurse=False)
    }
    return {id(p): held[id(p)] for p in parameters if id(p) in held}
