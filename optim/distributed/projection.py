"""A basis of r orthonormal columns spanning part of one side of a matrix: project onto it, lift from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class LowRankUpdate:
    """``factor * N P^T`` (right) or ``factor * P N`` (left), m x n, kept as its factors until it is written."""

    left: Tensor
    right: Tensor
    factor: float = 1.0

    def __rmul__(self, factor: float) -> LowRankUpdate:
        return LowRankUpdate(self.left, self.right, factor * self.factor)

    def write_to_(self, weight: Tensor, alpha: float, room: Workspace) -> None:
        """weight += alpha * this, rounded to the weight once.

        On a CPU ``addmm_`` adds the r products to the weight in several portions and rounds at the weight's size each
        time: 5e-6 off after 50 steps at weights of size one. A product of its own, in memory that all matrices of a
        step share, stays on the authors' bits. GPUs sum in registers first and need neither.
        """
        left, right = self.left.to(weight.dtype), self.right.to(weight.dtype)
        if weight.device.type != "cpu":
            weight.addmm_(left, right, alpha=alpha * self.factor)
            return
        lifted = torch.mm(left, right, out=room.like(weight))
        if math.frexp(self.factor)[0] == 0.5:  # a power of two, such as 0.25: no rounding, so no pass of its own
            weight.add_(lifted, alpha=alpha * self.factor)
        else:
            weight.add_(lifted.mul_(self.factor), alpha=alpha)

    def add_to_(self, dense: Tensor) -> Tensor:
        """dense += this, for gradients and updates, which are of one size with it."""
        return dense.addmm_(self.left.to(dense.dtype), self.right.to(dense.dtype), alpha=self.factor)

    def added_to(self, dense: Tensor) -> Tensor:
        """dense + this, in one new tensor."""
        return torch.addmm(dense, self.left.to(dense.dtype), self.right.to(dense.dtype), alpha=self.factor)

    def dense(self) -> Tensor:
        return torch.mm(self.left, self.right).mul_(self.factor)


class Workspace:
    """Memory for one m x n product, reused by all matrices of a step: fresh pages for each cost a tenth of it."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def clear(self) -> None:
        """Give the memory back, before a method that needs as much for something else."""
        self._memory = None

    def like(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor of the same shape and dtype, with anything in it."""
        held = self._memory
        if held is None or held.dtype != tensor.dtype or held.device != tensor.device or held.numel() < tensor.numel():
            self._memory = held = None  # before the larger one is born
            self._memory = held = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        return held[: tensor.numel()].view(tensor.shape)


class Basis:
    """P in the role of its frame: ``project`` an m x n gradient to its coordinates, ``lift`` coordinates back."""

    def __init__(self, columns: Tensor, frame: ProjectionSide) -> None:
        self.columns, self.frame = columns, frame

    def project(self, gradient: Tensor) -> Tensor:
        P = self.columns
        G = gradient.to(P.dtype)
        return G @ P if self.frame.right else P.t() @ G

    def lift(self, coordinates: Tensor) -> LowRankUpdate:
        P = self.columns
        N = coordinates.to(P.dtype)
        return LowRankUpdate(N, P.t()) if self.frame.right else LowRankUpdate(P, N)

    def line_norms(self, coordinates: Tensor) -> Tensor:
        """The norm of each line of coordinates along the projected axis, m x 1 (right) or 1 x n (left)."""
        norms: Tensor = torch.linalg.vector_norm(coordinates, dim=1 if self.frame.right else 0, keepdim=True)
        return norms


def first_columns(frame: ProjectionSide, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The basis before any gradient was seen: the first r unit vectors, orthonormal like every later one.

    Left columns are stored one after the other and right ones side by side, as LAPACK leaves U and V^T: BLAS then
    takes the same path, to the bit, as in the authors' code.
    """
    side, rank = frame.basis_shape
    if frame.right:
        return torch.eye(side, rank, dtype=dtype, device=device)
    return torch.eye(rank, side, dtype=dtype, device=device).t()
