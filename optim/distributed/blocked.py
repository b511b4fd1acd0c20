"""A large matrix in blocks of its rows or columns, so that what a step makes of it is not as large as all of it.

Only large matrices are: a smaller one is made at once. Where all of it must be known first, as its norm, blocks are
made twice, which takes time, and so only of larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from ..numbers import Number, add_
from .projection import LowRankUpdate

BLOCK = 2**22  # elements of a block: 16 MiB in fp32
LARGE = 2**23  # those of a matrix, more than which are made in blocks
LARGE_TWICE = 2**24  # where each block is made twice


class WrittenUpdate:
    """An update that writes itself into weights."""

    def add_to_weights_(self, weights: Tensor, alpha: Number) -> None:
        """weights += alpha * this."""
        raise NotImplementedError


@dataclass(frozen=True)
class Block:
    """Some rows (``axis`` 0) or columns (1) of a matrix."""

    axis: int
    begin: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """What belongs to the block of a tensor that is laid out as the matrix, or has one number for a row or a
        column, or one in all. A view."""
        if tensor.dim() <= self.axis or tensor.shape[self.axis] == 1:
            return tensor
        return tensor.narrow(self.axis, self.begin, self.length)


def is_large(shape: Sequence[int], twice: bool = False) -> bool:
    """Whether a matrix is made in blocks: in ones that are made ``twice``, or once."""
    return math.prod(shape) > (LARGE_TWICE if twice else LARGE)


def blocks(shape: Sequence[int], axis: int = 0, multiple: int = 1) -> Iterator[Block]:
    """A large matrix in blocks, whose lengths are multiples of ``multiple``, but for the last."""
    size = shape[axis]
    length = max(1, BLOCK * size // math.prod(shape) // multiple) * multiple
    for begin in range(0, size, length):
        yield Block(axis, begin, min(length, size - begin))


@dataclass(frozen=True)
class BlockedUpdate(WrittenUpdate):
    """An m x n update whose blocks are made by ``make`` as they are written."""

    shape: tuple[int, ...]
    make: Callable[[Block], Tensor]
    axis: int = 0

    def add_to_weights_(self, weights: Tensor, alpha: Number) -> None:
        for block in blocks(self.shape, self.axis):
            add_(block.of(weights), self.make(block), alpha)


@overload
def block_of(update: LowRankUpdate, block: Block) -> LowRankUpdate: ...
@overload
def block_of(update: Tensor | LowRankUpdate | WrittenUpdate, block: Block) -> Tensor | LowRankUpdate: ...
def block_of(update: Tensor | LowRankUpdate | WrittenUpdate, block: Block) -> Tensor | LowRankUpdate:
    """What an update is in a block."""
    if isinstance(update, LowRankUpdate):
        left, right = update.left, update.right
        if block.axis == 0:
            return LowRankUpdate(block.of(left), right, update.factor)
        return LowRankUpdate(left, block.of(right), update.factor)
    if isinstance(update, BlockedUpdate):
        return update.make(block)
    assert isinstance(update, Tensor), "an update that is written as a whole has no blocks"
    return block.of(update)


def squares_in_blocks(shape: Sequence[int], make: Callable[[Block], Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of squares over all blocks; a scalar on their device."""
    norms = [torch.linalg.vector_norm(make(block), dtype=dtype) for block in blocks(shape)]
    return torch.stack(norms).square_().sum()
