"""Measures of a change, as pure functions of vectors and values that were found before."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .decomposition import LINES


class Intruders(NamedTuple):
    """Leading singular vectors of W1 that are like none of W0's.

    number: how many.
    share: of the vectors that were looked at.
    energy: their share of the squared singular values that were looked at.
    """

    number: int
    share: float
    energy: float


def intruders(similarity: Tensor, values: Tensor, epsilon: float) -> Intruders:
    """Of vectors with a largest |cosine| ``similarity`` (k) to any vector of W0, and singular values ``values`` (k); an
    intruder is one whose similarity is below ``epsilon`` (arXiv:2410.21228)."""
    found = similarity < epsilon
    energy = values.square()
    return Intruders(
        int(found.sum()),
        ratio(float(found.sum()), len(found)),
        ratio(float(energy[found].sum()), float(energy.sum())),
    )


def drift(values0: Tensor, values1: Tensor) -> float:
    """NSS = |sigma(W1) - sigma(W0)| / |sigma(W0)|, both sorted (arXiv:2511.08567)."""
    return ratio(float((values1 - values0).norm()), float(values0.norm()))


def principal_angles(U0: Tensor, U1: Tensor) -> Tensor:
    """Principal angles between the column spaces of two m x k matrices with orthonormal columns.

    Args:
        U0, U1: m x k.

    Returns:
        k angles in degrees, rising. Small ones are found by their sines, for a cosine near 1 does not tell them
        (Björck & Golub 1973).

    Example:
        >>> from gracile.spectra import principal_angles
        >>> turned = torch.tensor([[0.6], [0.8], [0.0]])
        >>> principal_angles(torch.eye(3)[:, :1], turned)
        tensor([53.1301], dtype=torch.float64)
    """
    U0, U1 = U0.double(), U1.double()
    cosines = torch.linalg.svdvals(U0.mT @ U1)
    sines = torch.linalg.svdvals(U1 - U0 @ (U0.mT @ U1)).flip(0)
    return torch.rad2deg(torch.atan2(sines, cosines))


class Ranks(NamedTuple):
    """stable: |D|_F^2 / |D|_2^2. effective: exp of the entropy of the shares of the squared singular values."""

    stable: float
    effective: float


def ranks_of(values: Tensor) -> Ranks:
    """Stable and effective rank of a matrix, both 0 of zeros.

    Args:
        values: its singular values.

    Example:
        >>> from gracile.spectra import ranks_of
        >>> ranks_of(torch.tensor([2.0, 2.0, 0.0]))
        Ranks(stable=2.0, effective=2.0)
    """
    energy = values.double().square()
    total = float(energy.sum())
    if total == 0:
        return Ranks(0.0, 0.0)
    shares = energy / total
    entropy = -torch.special.xlogy(shares, shares).sum()
    return Ranks(total / float(energy.max()), round(float(entropy.exp()), 9))


class Overlap(NamedTuple):
    """share: of the changed weights, those that a mask of ``alpha`` of all holds. enrichment: that over ``alpha``;
    below 1 the change avoids the mask. Both 0 where no weight changed."""

    share: float
    enrichment: float


def changed_in_bf16(W0: Tensor, rows: Callable[[int, int], Tensor]) -> Tensor:
    """Which weights of W0 + D are others than W0's in bf16 (m x n, bool); ``rows`` gives some rows of D."""
    masks = []
    for i in range(0, len(W0), LINES):
        before = W0[i : i + LINES]
        masks.append((before + rows(i, i + LINES)).bfloat16() != before.bfloat16())
    return torch.cat(masks)


def overlap(changed: Tensor, size: Tensor, alpha: float) -> Overlap:
    """Of the weights that ``changed`` (m x n, bool) with the mask of the ``alpha`` largest of ``size`` (m x n): exactly
    that many, whatever ties there are."""
    count = round(alpha * size.numel())
    within = changed.flatten()[size.flatten().topk(count, sorted=False).indices].sum()
    share = ratio(float(within), float(changed.sum()))
    return Overlap(share, ratio(share, count / size.numel()))


def ratio(part: float, whole: float) -> float:
    """``part / whole``, and 0 for 0 of 0."""
    return 0.0 if part == 0 else part / whole if whole else float("inf")
