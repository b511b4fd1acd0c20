"""The matrices of a parameter: one, or those of a layer's experts in one tensor (E x m x n).

Masks, budgets and groups of weights are each matrix's own, as if the E matrices were E parameters; state and the way of
an ordinary step are the tensor's. Convolutions (out x in x height x width) are one matrix, out x (in height width).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ..distributed import FlatShard, FullShard

EXPERTS = 3  # dimensions of a tensor of experts


def matrices_in(shape: tuple[int, ...]) -> int:
    """How many matrices a parameter of ``shape`` holds."""
    return shape[0] if len(shape) == EXPERTS else 1


def shape_of_each(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one of a parameter's matrices, a convolution's as it is."""
    return shape[1:] if len(shape) == EXPERTS else shape


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """m, n of each of a parameter's matrices."""
    own = shape_of_each(shape)
    return own[0], math.prod(own[1:])


class Expert(NamedTuple):
    """One of a parameter's matrices: its ``number``, what this process holds of it, and from which to which of the
    elements that this process holds of the parameter that is."""

    number: int
    shard: FullShard
    begin: int
    end: int


def experts_of(shard: FullShard) -> Iterator[Expert]:
    """The matrices of a parameter that this process takes part in choosing for: those that are cut, on every process,
    in one order; and those that it holds entirely, as a process alone would."""
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
        if bounds[owner + 1] < last:
            yield Expert(number, _cut(shard, number, begin, end), begin, end)
        elif owner == index:
            yield Expert(number, WholeExpert(shard, number, begin, end), begin, end)


class WholeExpert(FullShard):
    """A matrix that this process holds entirely, of a parameter of which others may hold the rest."""

    def __init__(self, all_of_them: FullShard, number: int, begin: int, end: int) -> None:
        shape, gradient = all_of_them.shape[1:], all_of_them.held_gradient
        flat = isinstance(all_of_them, FlatShard)
        weights = all_of_them.parameter
        own = weights[begin:end].view(shape) if flat else weights[number]
        super().__init__(own, all_of_them.position, all_of_them.workspace)
        if gradient is not None:
            gradient = gradient[begin:end].view(shape) if flat else gradient[number]
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
