"""SORSA: the leading factors of a weight, trained apart and held near orthonormal.  Cao 2024, arXiv:2409.00055.

    U, S, V = svd_r(W)                      W m x n;  U m x r,  S r,  V r x n, all trained
    y = (W - U0 diag(S0) V0) x + U diag(S) V x
    loss + gamma / 2 (|| U^T U - I ||^2 + || V V^T - I ||^2), the mean over layers

Departures: the weight is left whole, and what is taken off it is kept as frozen factors, so that the adapter can be
switched off, stacked, saved alone and written as a LoRA of rank 2 r. The norms are squared, for the gradient of a norm
is noise of size one where training begins, and the term is in the loss before clipping: the authors step it after it,
with gamma over the peak learning rate. The change U diag(S) V is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...validation import Check, number
from ..config import AdapterConfig
from ..factors import gram_defect, svd_factors
from ..layer import LowRankLayer, Tensors
from ..names import AdapterType
from ..registry import register


@dataclass
class SorsaConfig(AdapterConfig):
    """SORSA (arXiv:2409.00055): r (m + n + 1) trained numbers a matrix.

    Attributes:
        gamma: weight of the squared distance of U and V from orthonormal, in the loss.

    Example:
        >>> from gracile.adapters import SorsaConfig
        >>> SorsaConfig(r=16, target_modules=["q_proj"], gamma=0.1).gamma
        0.1
    """

    checks: ClassVar[Mapping[str, Check]] = {"gamma": number(">= 0")}

    gamma: float = field(default=0.0, metadata={"help": "Weight of the distance from orthonormal, in the loss."})


@register(AdapterType.SORSA, SorsaConfig)
class SorsaLayer(LowRankLayer):
    """A linear layer with SORSA beside it."""

    prefix, trained, frozen = "sorsa_", ("U", "S", "V"), ("L0", "V0")
    adapts_experts = True

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        U, S, V = svd_factors(weight, r, config.seed)
        S = S / config.scale_of(self.name)
        return {"U": U, "S": S, "V": V, "L0": U * S, "V0": V}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        m, n = self.out_features, self.in_features
        return {"U": (m, r), "S": (r,), "V": (r, n), "L0": (m, r), "V0": (r, n)}

    def factors(self, config: Any, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        U, S, V, L0, V0 = (tensors[name] for name in (*self.trained, *self.frozen))
        return torch.cat([U * S, -L0], dim=1), torch.cat([V, V0])

    def penalty(self, config: Any, **tensors: Tensor) -> Tensor | None:
        if not config.gamma:
            return None
        defects: Tensor = config.gamma * (gram_defect(tensors["U"]) + gram_defect(tensors["V"].mT)) / 2
        return defects
