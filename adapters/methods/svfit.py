"""SVFit: the largest singular values of the weight are trained, nothing else.  Sun et al. 2024, arXiv:2409.05926.

    U, S, V = svd_r(W)                      W m x n, frozen;  U m x r,  S r,  V r x n, frozen
    y = W x + U diag(sigma - S) V x         sigma r, trained

What is trained is t, with sigma - S = S_1 t, S t or S (exp t - 1) by ``parametrization``: Adam moves all values by
equal amounts, and singular values span decades. The paper, of which no code was published, trains sigma itself. The
rank is the smallest that keeps ``energy`` of the sum of S^2, at most ``r``; without ``energy`` it is ``r``. The
residual of the weight stays, so that the function is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...validation import Check, number, one_of
from ..config import AdapterConfig
from ..factors import svd_factors
from ..layer import LowRankLayer, Tensors
from ..names import AdapterType
from ..registry import register


@dataclass
class SVFitConfig(AdapterConfig):
    """SVFit (arXiv:2409.05926): r trained numbers a matrix, and r (m + n + 1) frozen ones.

    Attributes:
        r: rank of the change of each matrix; with ``energy`` the largest that it may be.
        energy: share of the squares of a weight's singular values that is trained; None trains r of them.
        parametrization: ``normalized`` moves all singular values by the same shares of the largest, ``relative`` each
            by shares of its own, ``log`` likewise and never below zero.

    Example:
        >>> from gracile.adapters import SVFitConfig
        >>> SVFitConfig(r=64, target_modules=["q_proj"], energy=0.9).parametrization
        'normalized'
    """

    checks: ClassVar[Mapping[str, Check]] = {
        "energy": number("in (0, 1]", optional=True),
        "parametrization": one_of("normalized", "relative", "log"),
    }

    r: int = field(default=64, metadata={"help": "Rank of the change of each matrix; with energy, the largest."})
    energy: float | None = field(default=None, metadata={"help": "Share of the squares of singular values to train."})
    parametrization: str = field(default="normalized", metadata={"help": "normalized, relative or log."})


@register(AdapterType.SVFIT, SVFitConfig)
class SVFitLayer(LowRankLayer):
    """A linear layer with SVFit beside it."""

    prefix, trained, frozen = "svfit_", ("t",), ("U", "V", "S")
    adapts_experts = True

    def rank(self, config: Any) -> int:
        if config.energy is None or self.name in config.rank_pattern:
            return super().rank(config)
        if self.weightless:
            return min(super().rank(config), self.most)
        weight = self.wide_weight()
        most = min(config.r, *weight.shape)
        squares = svd_factors(weight, most, config.seed)[1].square()
        enough = squares.cumsum(0) >= config.energy * weight.square().sum()
        config.rank_pattern[self.name] = int(enough.int().argmax()) + 1 if enough.any() else most
        return super().rank(config)

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        U, S, V = svd_factors(weight, r, config.seed)
        return {"t": torch.zeros(r), "U": U, "V": V, "S": S}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        return {"t": (r,), "U": (self.out_features, r), "V": (r, self.in_features), "S": (r,)}

    def factors(self, config: Any, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        t, U, V, S = (tensors[name] for name in (*self.trained, *self.frozen))
        moved = {"normalized": lambda: S[0] * t, "relative": lambda: S * t, "log": lambda: S * torch.expm1(t)}
        return U * moved[config.parametrization](), V
