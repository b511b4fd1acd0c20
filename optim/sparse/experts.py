"""The matrices of a parameter: one, or those of a layer's experts in one tensor (E x m x n).

Masks, budgets and groups of weights are each matrix's own, as if the E matrices were E parameters; state and the way of
an ordinary step are the tensor's. Convolutions (out x in x height x width) are one matrix, out x (in height width).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from ..core.projected_gradient import ProjectedGradient
from ..distributed import FlatShard, FullShard, UnsupportedLayout

EXPERTS = 3  # dimensions of a tensor of experts


def matrices_in(shape: tuple[int, ...]) -> int:
    """How many matrices a parameter of ``shape`` holds."""
    return shape[0] if len(shape) == EXPERTS else 1


def shape_of_each(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one of a parameter's matrices, a convolution's as it is."""
    return shape[1:] if len(shape) == EXPERTS else shape


def as_matrix(shape: tuple[int, ...], transposed: bool = False) -> tuple[int, int]:
    """m, n of each of a parameter's matrices; of those that are stored ``transposed``, of what they are."""
    own = shape_of_each(shape)
    m, n = own[0], math.prod(own[1:])
    return (n, m) if transposed else (m, n)


def are_transposed(group: Mapping[str, Any]) -> bool:
    """Whether a group's experts are stored as E x n x m, the dimension of the inputs first (gpt-oss)."""
    return bool(group.get("transposed_experts", False))


def check_transposed(shape: tuple[int, ...], group: Mapping[str, Any]) -> None:
    """Refuse what has no experts."""
    if are_transposed(group) and len(shape) != EXPERTS:
        raise ValueError(
            f"transposed_experts=True is for experts (E x in x out), got a parameter of shape {shape}; put it into a "
            "group without it"
        )


def turned(places: Tensor, columns: int, rows: int) -> Tensor:
    """Places in a matrix of so many ``columns`` and ``rows`` as places in its transpose, ascending."""
    return (places % columns).mul_(rows).add_(places // columns).sort().values


class Expert(NamedTuple):
    """One of a parameter's matrices: its ``number``, what this process holds of it, and from which to which of the
    elements that this process holds of the parameter that is."""

    number: int
    shard: FullShard
    begin: int
    end: int


def experts_of(shard: FullShard, transposed: bool = False) -> Iterator[Expert]:
    """The matrices of a parameter that this process takes part in choosing for: those that are cut, on every process,
    in one order; and those that it holds entirely, as a process alone would. ``transposed``: as what they are."""
    if len(shard.shape) != EXPERTS:
        yield Expert(0, shard, 0, shard.parameter.numel())
        return
    size = math.prod(shard.shape[1:])
    bounds = shard.held.bounds if isinstance(shard, FlatShard) else (0, shard.shape[0] * size)
    index = shard.processes.index if isinstance(shard, FlatShard) else 0
    for number in range(shard.shape[0]):
        first, last = number * size, (number + 1) * size
        begin, end = (min(max(bound, first), last) - bounds[index] for bound in bounds[index : index + 2])
        owner = bisect_right(bounds, first) - 1
        if bounds[owner + 1] < last and transposed:
            raise UnsupportedLayout(
                f"transposed_experts=True needs whole experts, and those of a parameter of shape {shard.shape} are "
                "cut; split the model by FSDP2, which cuts between them"
            )
        if bounds[owner + 1] < last:
            yield Expert(number, _cut(shard, number, begin, end), begin, end)
        elif owner == index:
            yield Expert(number, WholeExpert(shard, number, begin, end, transposed), begin, end)


class WholeExpert(FullShard):
    """A matrix that this process holds entirely, of a parameter of which others may hold the rest."""

    def __init__(self, all_of_them: FullShard, number: int, begin: int, end: int, transposed: bool) -> None:
        shape, gradient = all_of_them.shape[1:], all_of_them.held_gradient
        flat = isinstance(all_of_them, FlatShard)
        weights = all_of_them.parameter
        own = weights[begin:end].view(shape) if flat else weights[number]
        super().__init__(own.t() if transposed else own, all_of_them.position, all_of_them.workspace)
        if isinstance(gradient, ProjectedGradient):  # whose mask changes by weights or by chance
            gradient = None
        if gradient is not None:
            gradient = gradient[begin:end].view(shape) if flat else gradient[number]
            gradient = gradient.t() if transposed else gradient
        self._gradient = gradient
        self.maximize = all_of_them.maximize

    @property
    def held_gradient(self) -> Tensor | None:
        return self._gradient


def _cut(shard: FullShard, number: int, begin: int, end: int) -> FlatShard:
    assert isinstance(shard, FlatShard)
    size = math.prod(shard.shape[1:])
    bounds = tuple(min(max(bound - number * size, 0), size) for bound in shard.held.bounds)
    held = replace(shard.held, shape=shard.shape[1:], bounds=bounds)
    own = FlatShard(shard.parameter[begin:end], shard.held_gradient[begin:end], held, shard.position, shard.workspace)
    own.maximize = shard.maximize
    return own
