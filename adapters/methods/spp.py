"""SPP: a pruned weight is rescaled by rows and columns, and keeps its zeros.  Lu et al. 2024, arXiv:2405.16057.

    W m x n with zeros, frozen;   Wa r x n by Kaiming's rule,  Wb m zero, both trained
    g(i) = floor(i r / m)                              the group of row i
    y = W x + s (Wa[g] * Wb * W) x                     elementwise, Wb over columns
    merged: W * (1 + s Wa[g] * Wb), zero where W is

Departures from the published code: groups may be of unequal sizes, r is the configuration's and not 16, and merging, in
fp32, is undone to the bit. A weight that is zero stays so for good, also where it was not pruned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from ..layer import AdapterLayer, Tensors
from ..names import AdapterType
from ..registry import register


@dataclass
class SPPConfig(AdapterConfig):
    """SPP (arXiv:2405.16057): r n + m trained numbers a matrix.

    Attributes:
        r: groups of rows that share the factors of columns.

    Example:
        >>> from gracile.adapters import SPPConfig
        >>> SPPConfig(target_modules=["q_proj"]).alpha
        32.0
    """

    r: int = field(default=16, metadata={"help": "Groups of rows that share the factors of columns."})
    alpha: float | None = field(default=32.0, metadata={"help": "The change is scaled by alpha / r."})


@register(AdapterType.SPP, SPPConfig)
class SPPLayer(AdapterLayer):
    """A linear layer with SPP beside it."""

    prefix, trained = "spp_", ("Wa", "Wb")
    adapts_experts = True

    @property
    def most(self) -> int:
        return self.out_features

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        Wa = torch.empty(r, self.in_features)
        nn.init.kaiming_uniform_(Wa, a=math.sqrt(5), generator=self.generator(config))
        return {"Wa": Wa, "Wb": torch.zeros(self.out_features)}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        return {"Wa": (r, self.in_features), "Wb": (self.out_features,)}

    def delta(self, weight: Tensor, config: Any, **tensors: Tensor) -> Tensor:
        Wa, Wb = tensors["Wa"], tensors["Wb"]
        rows = torch.arange(len(Wb), device=Wb.device)
        return Wa[rows * len(Wa) // len(Wb)] * Wb[:, None] * weight
