"""SoKA: the leading Kronecker products of the weight, trained.  Chong et al. 2025, arXiv:2506.15251.

    W m x n,  m = m1 m2,  n = n1 n2
    R(W)  (m1 n1) x (m2 n2):  row (i, j) is the block of m2 x n2 at i, j of W        Van Loan and Pitsianis 1993
    svd_r(R) = sum_k s_k u_k v_k^T,   U_k = u_k as m1 x n1,   V_k = v_k as m2 x n2;  all trained
    y = (W - sum_k s0_k U0_k (x) V0_k) x + sum_k s_k (U_k (x) V_k) x

A Kronecker product is applied as U X V^T to x as an n1 x n2 matrix, and never formed. The rank is the smaller of what
holds ``energy`` of R's squares and the elbow of log s, at most ``r``. The paper's body could not be read: m1 and n1 are
the divisors nearest the roots of m and n, and factors start from the weight; its pruning in training is left out. As
for SORSA what is taken off the weight is kept as frozen factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...validation import Check, flag, number
from ..config import AdapterConfig
from ..factors import svd_factors
from ..layer import AdapterLayer, Tensors
from ..names import AdapterType
from ..registry import register


@dataclass
class SokaConfig(AdapterConfig):
    """SoKA (arXiv:2506.15251): r (m1 n1 + m2 n2 + 1) trained numbers a matrix, at 4096 x 4096 8193 r.

    Attributes:
        r: the most Kronecker products of a matrix.
        energy: share of the squares of the rearranged weight to hold, for a smaller r; None for r.
        elbow: whether r is at most where the logarithms of the singular values are farthest from their chord.

    Example:
        >>> from gracile.adapters import SokaConfig
        >>> SokaConfig(r=16, target_modules=["q_proj"], energy=0.9).elbow
        False
    """

    checks: ClassVar[Mapping[str, Check]] = {"energy": number("in (0, 1]", optional=True), "elbow": flag()}

    energy: float | None = field(default=None, metadata={"help": "Share of the rearranged weight's squares to hold."})
    elbow: bool = field(default=False, metadata={"help": "Whether r is at most the elbow of the singular values."})


@register(AdapterType.SOKA, SokaConfig)
class SokaLayer(AdapterLayer):
    """A linear layer with SoKA beside it."""

    prefix, trained, frozen = "soka_", ("U", "S", "V"), ("L0", "V0")

    @property
    def most(self) -> int:
        (m1, m2), (n1, n2) = divided(self.out_features), divided(self.in_features)
        return min(m1 * n1, m2 * n2)

    def rank(self, config: Any) -> int:
        if (config.energy is None and not config.elbow) or self.name in config.rank_pattern:
            return super().rank(config)
        if self.weightless:
            return min(super().rank(config), self.most)
        R = rearranged(self.wide_weight())
        S = svd_factors(R, min(config.r, *R.shape), config.seed)[1]
        held = len(S) if config.energy is None else held_by(S, config.energy * R.square().sum())
        config.rank_pattern[self.name] = min(held, elbow(S) if config.elbow else len(S))
        return super().rank(config)

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        (m1, m2), (n1, n2) = divided(weight.shape[0]), divided(weight.shape[1])
        U, S, V = svd_factors(rearranged(weight), r, config.seed)
        S = S / config.scale_of(self.name)
        U, V = U.mT.reshape(r, m1, n1), V.reshape(r, m2, n2)
        return {"U": U, "S": S, "V": V, "L0": U * S[:, None, None], "V0": V}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        (m1, m2), (n1, n2) = divided(self.out_features), divided(self.in_features)
        return {"U": (r, m1, n1), "S": (r,), "V": (r, m2, n2), "L0": (r, m1, n1), "V0": (r, m2, n2)}

    def _products(self, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """U 2r x m1 x n1 and V 2r x m2 x n2 of what is added and of what is taken off."""
        U, S, V, L0, V0 = (tensors[name] for name in (*self.trained, *self.frozen))
        return torch.cat([U * S[:, None, None], -L0]), torch.cat([V, V0])

    def delta(self, weight: Tensor, config: Any, **tensors: Tensor) -> Tensor:
        U, V = self._products(**tensors)
        return torch.einsum("kab,kcd->acbd", U, V).reshape(self.out_features, self.in_features)

    def changed(self, x: Tensor, adapter: str) -> Tensor:
        U, V = self._products(**self.tensors(adapter))
        X = x.unflatten(-1, (U.shape[2], V.shape[2]))
        right = torch.einsum("...bd,kcd->k...bc", X, V)
        return torch.einsum("kab,k...bc->...ac", U, right).flatten(-2)


def divided(side: int) -> tuple[int, int]:
    """A side as the product of two, the first nearest its root; of a prime number 1 and itself."""
    root = math.sqrt(side)
    first = min((d for d in range(1, side + 1) if side % d == 0), key=lambda d: abs(d - root))
    return first, side // first


def rearranged(weight: Tensor) -> Tensor:
    """R(W), (m1 n1) x (m2 n2)."""
    (m1, m2), (n1, n2) = divided(weight.shape[0]), divided(weight.shape[1])
    return weight.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)


def held_by(S: Tensor, squares: Tensor) -> int:
    """How many of the largest singular values hold this much of the squares; all of them where they do not."""
    enough = S.square().cumsum(0) >= squares
    return int(enough.int().argmax()) + 1 if enough.any() else len(S)


def elbow(S: Tensor) -> int:
    """How many singular values there are before their logarithms are farthest from the chord of first and last."""
    if len(S) < 3:
        return len(S)
    logs, places = S.clamp_min(1e-12).log(), torch.arange(len(S), device=S.device)
    chord = logs[0] + (logs[-1] - logs[0]) * places / (len(S) - 1)
    return max(1, int((logs - chord).abs().argmax()))
