"""Terms of a loss on the change of a weight, for any adapter or script: matrices in, a number out, less is better."""

from __future__ import annotations

import torch
from torch import Tensor


def fisher_term(change: Tensor, fisher: Tensor) -> Tensor:
    """sum F * D^2: a change D (m x n) weighed by a diagonal Fisher matrix F (m x n), the mean square of gradients."""
    return (fisher * change.square()).sum()


def overlap_term(one: Tensor, other: Tensor, weight: Tensor, beta: float = 1.0) -> Tensor:
    """sum (1 + beta sigmoid(|W + D| - tau)) |D1 * D2| of two changes D1 and D2 (m x n) of a weight W, D their sum and
    tau the median of |W|: what both change, and the more where the weight is large."""
    active = torch.sigmoid((weight + one + other).abs() - weight.abs().median())
    return ((1 + beta * active) * (one * other).abs()).sum()


def angle_term(one: Tensor, other: Tensor) -> Tensor:
    """<D1, D2>^2 / (|D1|^2 |D2|^2) of two changes (m x n): 0 where they are orthogonal, 1 where they are parallel."""
    sizes = one.square().sum() * other.square().sum()
    return (one * other).sum().square() / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
