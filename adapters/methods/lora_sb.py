"""LoRA-SB: LoRA-XS between the factors of the first step of full fine-tuning.  Ponkshe et al. 2024, arXiv:2411.19557.

    G = the mean gradient of W on some batches          W m x n, frozen
    D = -lr sign(G)                                     Adam's first step
    U, S, V = svd_r(D)                                  m x r,  r,  r x n
    B = U,  A = V frozen;  R = diag(S), trained         r x r
    y = W x + B R A x

The gradient that W sees is B (B^T G A^T) A, the projection of G: there is no alpha to tune. ``start="gradient"`` takes
the factors of -lr G, whose leading ones hold more of it than those of its sign, which is noise of full rank where G is
small; ``start="zero"`` has R = 0 between the same factors, and leaves the function as it is.

Departures from the published code: factors stay in fp32 (theirs are rounded to bf16, and are then orthonormal to 1e-2),
dropout is off in the pass, gradients of targets alone are looked at, and no global seed is set.
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
class LoraSBConfig(AdapterConfig):
    """LoRA-SB (arXiv:2411.19557): r^2 trained numbers a matrix, and r (m + n) frozen ones. ``calibrate`` comes first.

    Attributes:
        start: ``sign`` begins with the best change of rank r towards -lr sign(G), ``gradient`` towards -lr G, ``zero``
            with none, between the factors of the sign.
        lr: size of the first step: the learning rate over the steps of warm-up, as the authors have it.

    Example:
        >>> from gracile.adapters import LoraSBConfig
        >>> LoraSBConfig(r=16, target_modules=["q_proj"], start="zero").calibrated
        False
    """

    checks: ClassVar[Mapping[str, Check]] = {"start": one_of("sign", "gradient", "zero"), "lr": number("> 0")}

    start: str = field(default="sign", metadata={"help": "sign, gradient or zero: what R begins with."})
    lr: float = field(default=1e-6, metadata={"help": "Size of the step that R begins with."})

    def statistic(self, gradient: Tensor) -> Tensor:
        """What is averaged over batches: the gradient (m x n)."""
        return gradient


@register(AdapterType.LORASB, LoraSBConfig)
class LoraSBLayer(LowRankLayer):
    """A linear layer with LoRA-SB beside it."""

    prefix, trained, frozen, needs_statistics = "lorasb_", ("R",), ("A", "B"), True

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        G = config.statistics[self.name].to(weight.device)
        step = -config.lr * (G if config.start == "gradient" else G.sign())
        U, S, V = svd_factors(step, r, config.seed)
        R = torch.diag(S / config.scale_of(self.name))
        return {"R": torch.zeros_like(R) if config.start == "zero" else R, "A": V, "B": U}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        return {"R": (r, r), "A": (r, self.in_features), "B": (self.out_features, r)}

    def factors(self, config: Any, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        return tensors["B"], tensors["R"] @ tensors["A"]
