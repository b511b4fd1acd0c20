"""A basis of r orthonormal columns spanning part of one side of a matrix: project onto it, lift from it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.projected_gradient import Kept, ProjectedGradient
from ..distributed import LowRankUpdate, ProjectionSide, matmul

AT_ONCE = 2**22  # elements of a gradient that are made wider at a time


class Basis:
    """P on its side of a matrix: ``project`` an m x n gradient to its coordinates, ``lift`` coordinates back. Of alike
    matrices, all of which have a dimension more, as of one."""

    def __init__(self, columns: Tensor, side: ProjectionSide) -> None:
        self.columns, self.side = columns, side

    def project(self, gradient: Tensor) -> Tensor:
        P = self.columns
        if isinstance(gradient, ProjectedGradient):
            return gradient.kept.coordinates
        if gradient.dtype != P.dtype and gradient.numel() > AT_ONCE:
            return self._project_in_parts(gradient)
        G = gradient.to(P.dtype)
        return matmul(G, P) if self.side.right else matmul(P.mT, G)

    def _project_in_parts(self, gradient: Tensor) -> Tensor:
        """``project`` of some lines at a time, so that not all of a gradient is made in another dtype."""
        P, right = self.columns, self.side.right
        axis = -2 if right else -1
        shape = list(gradient.shape)
        shape[-1 if right else -2] = P.shape[-1]
        coordinates = P.new_empty(shape)
        lines = max(1, AT_ONCE * gradient.shape[axis] // gradient.numel())
        for part, own in zip(torch.split(gradient, lines, axis), torch.split(coordinates, lines, axis), strict=True):
            own.copy_(self.project(part.to(P.dtype)))
        return coordinates

    def reduce(self, gradient: Tensor, directions: Tensor) -> Kept:
        """The coordinates of a gradient, and what is outside of them times ``directions`` (side x columns)."""
        P, Z = self.columns, directions.to(self.columns.dtype)
        R, G = self.project(gradient), gradient.to(P.dtype)
        if self.side.right:
            outside = matmul(G, Z).sub_(matmul(R, matmul(P.mT, Z)))
        else:
            outside = matmul(Z.mT, G).sub_(matmul(matmul(Z.mT, P), R))
        return Kept(R, outside)

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
