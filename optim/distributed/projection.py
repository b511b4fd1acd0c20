"""Which side of a matrix a subspace replaces, and an update that is the product of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..numbers import Number, scaled
from .products import addmm, addmm_, matmul

PROJ_TYPES = ("std", "reverse_std", "left", "right")


@dataclass(frozen=True)
class ProjectionSide:
    """Which side of an m x n matrix is replaced by r coordinates. Decided once, from the shape alone.

    ``right``: P is n x r and R = G P is m x r.  ``left``: P is m x r and R = P^T G is r x n.
    A rank above ``min(m, n)`` is capped there, as GaLore's code does.
    """

    shape: tuple[int, int]
    rank: int
    right: bool

    @classmethod
    @lru_cache(maxsize=1024)  # asked for each matrix in each step
    def of(cls, shape: tuple[int, int], rank: int, proj_type: str) -> ProjectionSide:
        m, n = shape
        right = {"std": m >= n, "reverse_std": m < n, "left": False, "right": True}[proj_type]
        return cls((m, n), min(rank, m, n), right)

    @property
    def basis_shape(self) -> tuple[int, int]:
        return (self.shape[1] if self.right else self.shape[0], self.rank)

    @property
    def projected_shape(self) -> tuple[int, int]:
        return (self.shape[0], self.rank) if self.right else (self.rank, self.shape[1])

    @property
    def line_axis(self) -> int:
        """Which dimension of the matrix, and of its coordinates, counts lines: rows on the right, columns on the
        left."""
        return 0 if self.right else 1

    @property
    def lines(self) -> int:
        """How many lines the matrix has."""
        return self.shape[self.line_axis]

    @property
    def line_length(self) -> int:
        return self.shape[1 - self.line_axis]


@dataclass(frozen=True)
class LowRankUpdate:
    """``factor * N P^T`` (right) or ``factor * P N`` (left), m x n, kept as its factors until a shard writes it. Of
    several alike matrices where its factors have a dimension more."""

    left: Tensor
    right: Tensor
    factor: Number = 1.0

    def __rmul__(self, factor: float) -> LowRankUpdate:
        return self.times(factor)

    def times(self, factor: Number) -> LowRankUpdate:
        """``factor`` of this; a tensor does not let an operator have it."""
        return LowRankUpdate(self.left, self.right, factor * self.factor)

    def to(self, dtype: torch.dtype) -> LowRankUpdate:
        return LowRankUpdate(self.left.to(dtype), self.right.to(dtype), self.factor)

    def add_to_(self, dense: Tensor) -> Tensor:
        """dense += this, for gradients and updates, which are of one size with it."""
        return add_product_(dense, self.left.to(dense.dtype), self.right.to(dense.dtype), self.factor)

    def added_to(self, dense: Tensor, out: Tensor | None = None) -> Tensor:
        """dense + this, in one new tensor or in ``out``, which may be ``dense``."""
        left, factor = scaled(self.left.to(dense.dtype), self.factor)
        return addmm(dense, left, self.right.to(dense.dtype), factor, out)

    def product(self) -> Tensor:
        """This without its factor."""
        return matmul(self.left, self.right)

    def dense(self, out: Tensor | None = None) -> Tensor:
        return matmul(self.left, self.right, out).mul_(self.factor)


def add_product_(dense: Tensor, left: Tensor, right: Tensor, factor: Number) -> Tensor:
    """dense += factor * left right, of matrices or of stacks of them."""
    left, factor = scaled(left, factor)
    return addmm_(dense, left, right, factor)
