"""A basis of r orthonormal columns spanning part of one side of a matrix: project onto it, lift from it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import LowRankUpdate, ProjectionSide


class Basis:
    """P on its side of a matrix: ``project`` an m x n gradient to its coordinates, ``lift`` coordinates back. Of alike
    matrices, all of which have a dimension more, as of one."""

    def __init__(self, columns: Tensor, side: ProjectionSide) -> None:
        self.columns, self.side = columns, side

    def project(self, gradient: Tensor) -> Tensor:
        P = self.columns
        G = gradient.to(P.dtype)
        return G @ P if self.side.right else P.mT @ G

    def lift(self, coordinates: Tensor) -> LowRankUpdate:
        P = self.columns
        N = coordinates.to(P.dtype)
        return LowRankUpdate(N, P.mT) if self.side.right else LowRankUpdate(P, N)

    def line_norms(self, coordinates: Tensor) -> Tensor:
        """The norm of each line of coordinates along the projected axis, m x 1 (right) or 1 x n (left)."""
        norms: Tensor = torch.linalg.vector_norm(coordinates, dim=-1 if self.side.right else -2, keepdim=True)
        return norms


def first_columns(side: ProjectionSide, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The basis before any gradient was seen: the first r unit vectors, orthonormal like every later one.

    Left columns are stored one after the other and right ones side by side, as LAPACK leaves U and V^T: BLAS then
    takes the same path, to the bit, as in the authors' code.
    """
    length, rank = side.basis_shape
    if side.right:
        return torch.eye(length, rank, dtype=dtype, device=device)
    return torch.eye(rank, length, dtype=dtype, device=device).t()
