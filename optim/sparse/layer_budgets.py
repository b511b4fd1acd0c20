"""How many weights of each matrix stay, when all of them together keep a share: whole numbers that add up exactly.

    uniform   K_l ~ N_l                      every matrix as sparse as the whole
    er, erk   K_l ~ p_l N_l                  Erdos-Renyi (Mocanu et al. 2018; the kernel form of Evci et al. 2020,
                                             arXiv:1911.11134): p_l = (sum of its dimensions) / (their product), where
                                             er counts two dimensions and erk all; none above N_l
    lamp      K_l of the K largest scores    w_i^2 / (the sum of w_j^2 over all j of the matrix with |w_j| >= |w_i|)
                                             (Lee et al. 2021, arXiv:2010.07611)
    global    K_l of the K largest |w|

Departures from published code: fractions left over by rounding down go to the matrices with the largest, so that the
sum is exact where theirs drifts by a unit a matrix; matrices that an ER share would make more than full become full
together where they tie (to 1e-12); lamp keeps as many as asked for where scores tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...fp64 import has_fp64
from ..distributed import held_shard
from .top_k import Choice, keys_of, largest_of_all

BY_SHAPE = ("uniform", "er", "erk")
BY_WEIGHT = ("lamp", "global")
DISTRIBUTIONS = BY_SHAPE + BY_WEIGHT


def budgets(units: Sequence[int], shapes: Sequence[tuple[int, ...]], density: float, distribution: str) -> list[int]:
    """How many of ``units[l]`` stay in a matrix of ``shapes[l]``. Of ``BY_SHAPE``.

    The sum is ``round(density * sum(units))``.
    """
    total = round(density * sum(units))
    odds = [1.0 if distribution == "uniform" else _odds(shape, distribution) for shape in shapes]
    full: set[int] = set()
    while True:
        left = total - sum(units[i] for i in full)
        free = [i for i in range(len(units)) if i not in full]
        eps = left / max(sum(odds[i] * units[i] for i in free), 1e-300)
        largest = max((eps * odds[i] for i in free), default=0.0)
        if largest <= 1 + 1e-12:
            shares = [float(units[i]) if i in full else eps * odds[i] * units[i] for i in range(len(units))]
            return whole_numbers(shares, units, total)
        full |= {i for i in free if eps * odds[i] >= largest * (1 - 1e-12)}


def _odds(shape: tuple[int, ...], distribution: str) -> float:
    counted = shape if distribution == "erk" else shape[:2]
    return sum(counted) / max(1, math.prod(counted))


def whole_numbers(shares: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """``shares`` as whole numbers that add up to ``total``, none above ``most``: rounded down, and what is left to the
    largest fractions."""
    counts = [min(math.floor(share + 1e-9), top) for share, top in zip(shares, most, strict=True)]
    by_fraction = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    missing = total - sum(counts)
    while missing > 0:
        for i in by_fraction:
            if missing and counts[i] < most[i]:
                counts[i] += 1
                missing -= 1
    return counts


def budgets_by_weight(weights: Sequence[Tensor], density: float, distribution: str) -> list[int]:
    """How many of each whole matrix stay. Of ``BY_WEIGHT``.

    Scores of one matrix exist at a time, and twice: they are made again rather than kept.
    """
    choices = []
    for weight in weights:
        own = weight.detach().reshape(-1)
        score = _LampScores(own) if distribution == "lamp" else _Magnitudes(own)
        choices.append(Choice(held_shard(own), own.numel(), score))
    total = round(density * sum(weight.numel() for weight in weights))
    return [len(chosen) for chosen in largest_of_all(choices, total)]


class _Magnitudes:
    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, begin: int, end: int) -> Tensor:
        return keys_of(self.weights[begin:end].float())


class _LampScores(_Magnitudes):
    """Keys of the scores of one matrix; kept from the first of its parts that is asked for to the last."""

    keys: Tensor | None = None

    def __call__(self, begin: int, end: int) -> Tensor:
        if end == begin:
            return torch.empty(0, dtype=torch.int32, device=self.weights.device)
        keys = keys_of(lamp_scores(self.weights).float()) if self.keys is None else self.keys
        self.keys = None if end == len(self.weights) else keys
        return keys[begin:end]


def lamp_scores(weights: Tensor) -> Tensor:
    """The LAMP score (fp64, or fp32 on a device that has none) of each of ``weights`` (flat). The largest has 1; where
    weights tie, the lower index scores higher; zeros have 0."""
    if not has_fp64(weights.device):
        return lamp_scores(weights.cpu()).float().to(weights.device)
    squares, order = weights.double().square().sort(stable=True, descending=True)
    sums = squares.cumsum(0)  # in fp64: matrices have 1e8 elements
    scores = torch.where(squares > 0, squares / sums.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return torch.empty_like(scores).scatter_(0, order, scores)
