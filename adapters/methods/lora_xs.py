"""LoRA-XS: a square matrix between the frozen leading factors of the weight.  Balazy et al. 2024, arXiv:2405.17604.

    U, S, V = svd_r(W)              W m x n, frozen;  U m x r,  S r,  V r x n
    B = U,  A = diag(S) V           frozen;  m x r  and  r x n
    y = W x + s B R A x             R r x r, trained

Departure: R begins at zero, where the authors draw it with a standard deviation of 1e-5 (``init_std``): the function is
unchanged, and R's gradient B^T G A^T is not zero. The factors are kept in fp32 where the base is in bf16, and are
buffers, which no optimizer decays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...validation import Check, number
from ..config import AdapterConfig
from ..factors import svd_factors
from ..layer import LowRankLayer, Tensors
from ..names import AdapterType
from ..registry import register


@dataclass
class LoraXSConfig(AdapterConfig):
    """LoRA-XS (arXiv:2405.17604): r^2 trained numbers a matrix, and r (m + n) frozen ones.

    Attributes:
        init_std: standard deviation of R at the beginning; 0 leaves the function as it is.

    Example:
        >>> from gracile.adapters import LoraXSConfig
        >>> LoraXSConfig(r=16, target_modules=["q_proj"]).r
        16
    """

    checks: ClassVar[Mapping[str, Check]] = {"init_std": number(">= 0")}

    init_std: float = field(default=0.0, metadata={"help": "Standard deviation of R at the beginning."})


@register(AdapterType.LORAXS, LoraXSConfig)
class LoraXSLayer(LowRankLayer):
    """A linear layer with LoRA-XS beside it."""

    prefix, trained, frozen = "loraxs_", ("R",), ("A", "B")
    adapts_experts = True

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        U, S, V = svd_factors(weight, r, config.seed)
        R = torch.randn(r, r, generator=self.generator(config)) * config.init_std
        return {"R": R, "A": S[:, None] * V, "B": U}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        return {"R": (r, r), "A": (r, self.in_features), "B": (self.out_features, r)}

    def factors(self, config: Any, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        return tensors["B"], tensors["R"] @ tensors["A"]
