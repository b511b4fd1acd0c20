"""A fixed cosine basis: one orthogonal k x k matrix for all sides of length k, of which a matrix uses r columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...fp64 import fp64_device
from ..distributed import MadeOnce, ProjectionSide

ROWS = 512  # of the cosines that are made at a time, in fp64
BLOCKS = 8  # a product of m x k is looked at in parts, so that it never stands whole in memory


@MadeOnce
def cosine_basis(k: int, device: torch.device) -> Tensor:
    """Q_ij = sqrt(2 / k) cos(i (2 j + 1) pi / (2 k)), row 0 times sqrt(1/2): k x k, fp32, shared by all matrices.

    The phase is reduced modulo its period in whole numbers and the cosine taken in fp64: orthogonal to 1e-7, where
    fp32 phases lose three digits at k = 4096.
    """
    at = fp64_device(device)
    Q = torch.empty(k, k, device=at)
    odd = 2 * torch.arange(k, device=at) + 1
    rows = torch.arange(k, device=at).unsqueeze(1)
    for i, part in zip(torch.split(rows, ROWS), torch.split(Q, ROWS), strict=True):
        phase = (i * odd) % (4 * k)
        cosines = torch.cos(phase.double() * (math.pi / (2 * k))).mul_(math.sqrt(2 / k))
        part.copy_(torch.where(i == 0, cosines * math.sqrt(0.5), cosines))
    return Q.to(device)


def column_scores(A: Tensor, Q: Tensor, side: ProjectionSide, p: int) -> Tensor:
    """sum |S|^p over each of the k lines of S = A Q (right) or Q^T A (left): what each column holds of A (m x n). Here
    and below, of several matrices where there is a dimension before."""
    lines = A if side.right else A.mT
    scores = torch.zeros(*A.shape[:-2], Q.shape[0], dtype=Q.dtype, device=Q.device)
    for part in torch.chunk(lines, BLOCKS, dim=-2):
        S = part.to(Q.dtype) @ Q
        scores += S.abs_().sum(dim=-2) if p == 1 else S.square_().sum(dim=-2)
    return scores


def best_columns(scores: Tensor, r: int) -> Tensor:
    """Indices of the r largest scores, largest first, ties by index (r, int32)."""
    return torch.sort(scores, descending=True, stable=True).indices[..., :r].to(torch.int32)


def kept_places(previous: Tensor, current: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For each current column, its place among the previous ones (r, int64), and whether it has one (r, bool)."""
    places = torch.full((*previous.shape[:-1], k), -1, dtype=torch.int64, device=previous.device)
    numbers = torch.arange(previous.shape[-1], device=previous.device).expand(previous.shape)
    place = places.scatter_(-1, previous.long(), numbers).gather(-1, current.long())
    return place.clamp(min=0), place >= 0
