"""ALLoRA: LoRA without scale or dropout, whose rows learn the faster the smaller they are.  Huang et al. 2024,
arXiv:2410.09692.

    y = W x + B A x                               W m x n frozen;  A r x n by Kaiming's rule,  B m x r zero
    c_i = 1 / sqrt(||p_i|| + 1 / eta^2)           of each row p_i of A and of B, at every step; eta at a row of zeros
    p_i <- p_i + c_i u_i                          u what the optimizer would have added

The paper scales gradients; Adam divides by their size, so what is scaled is the update, as the paper's factor on SGD's
gradient does. Which norm it means could not be read; rows' are taken, of both factors, in fp32. Other people's code
takes it once, at the first step; here it is taken at each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...validation import Check, number
from ..config import AdapterConfig
from ..layer import LowRankLayer, Tensors
from ..names import AdapterType
from ..registry import register


@dataclass
class ALLoraConfig(AdapterConfig):
    """ALLoRA (arXiv:2410.09692): r (m + n) trained numbers a matrix.

    Attributes:
        eta: factor on the updates of a row of zeros, and the largest there is.

    Example:
        >>> from gracile.adapters import ALLoraConfig
        >>> ALLoraConfig(r=16, target_modules=["q_proj"]).eta
        2.0
    """

    checks: ClassVar[Mapping[str, Check]] = {"eta": number("> 0")}

    eta: float = field(default=2.0, metadata={"help": "Factor on the updates of a row of zeros, the largest."})


@register(AdapterType.ALLORA, ALLoraConfig)
class ALLoraLayer(LowRankLayer):
    """A linear layer with ALLoRA beside it."""

    prefix, trained = "allora_", ("A", "B")
    adapts_experts = True

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        generator = self.generator(config)
        A = torch.empty(r, self.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        return {"A": A, "B": torch.zeros(self.out_features, r)}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        return {"A": (r, self.in_features), "B": (self.out_features, r)}

    def factors(self, config: Any, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        refuse_engines(tensors["B"])
        return tensors["B"], tensors["A"]

    def before_step(self, step: int, adapter: str) -> None:
        self._before = {name: p.detach().clone() for name, p in self.tensors(adapter).items()}

    @torch.no_grad()
    def on_step(self, step: int, adapter: str) -> None:
        eta = self.settings[adapter].eta
        for name, p in self.tensors(adapter).items():
            before = self._before.pop(name)
            p.copy_(before + row_rates(before, eta) * (p - before))


def refuse_engines(p: Tensor) -> None:
    """DeepSpeed's optimizers move flat copies of parameters, where rows cannot be told apart."""
    if hasattr(p, "_hp_mapping") or hasattr(p, "ds_id"):
        raise ValueError(
            "ALLoraConfig scales rows in the optimizer's step, and DeepSpeed steps flat copies; use FSDP2 or DDP"
        )


def row_rates(rows: Tensor, eta: float) -> Tensor:
    """c_i of each row (... x rows x 1)."""
    return (rows.norm(dim=-1, keepdim=True) + 1 / eta**2).rsqrt()
