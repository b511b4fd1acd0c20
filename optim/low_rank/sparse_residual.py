"""A sparse support: for each row of a matrix the q columns where a score was largest, found in one pass."""

from __future__ import annotations

import torch
from torch import Tensor


def first_support(rows: int, q: int, device: torch.device) -> Tensor:
    """The support before any score was seen: the q first columns of each row (rows x q, int32)."""
    return torch.arange(q, dtype=torch.int32, device=device).expand(rows, q).contiguous()


def absorb_(support: Tensor, totals: Tensor, scores: Tensor) -> None:
    """Update ``support`` (rows x q, int32) and its ``totals`` (rows x q) with a step's ``scores`` (rows x n, >= 0).

    The q candidates of each row add up their scores; the step's q best others challenge them with one score each, and
    the q largest stay. Memory is that of the support, not of the matrix. ``scores`` is used up.
    """
    held = support.long()
    q = held.shape[-1]
    totals.add_(scores.gather(-1, held))
    best, places = scores.scatter_(-1, held, -1.0).topk(min(q, scores.shape[-1] - q), dim=-1)
    kept, order = torch.cat([totals, best], dim=-1).topk(q, dim=-1)
    support.copy_(torch.cat([held, places], dim=-1).gather(-1, order))
    totals.copy_(kept)
