"""PST: pruned while it is tuned, by scores of low rank.  Li et al. 2022, arXiv:2205.11005.

    W' = W + beta U V                                   W m x n frozen;  U m x r,  V r x n zero
    Z  = |W'| + a1 P Q + a2 (R 1^T + 1 C^T)             P m x r,  Q r x n zero,  R m zero,  C n zero
    M  = 1 but for the floor(s_t m n) lowest of Z       s_t by Zhu and Gupta's cubic, between the warm-ups
    y  = (M * W') x                                     d M / d Z = 1;  U, V, P, Q, R, C are trained

Departures: U and P are drawn with variance 1 / r, not 1, and the lowest are found by a selection every ``mask_every``
steps, not by sorting all of Z in every pass. A mask is the same in all passes between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...validation import Check, finite, number, whole
from ..config import AdapterConfig
from ..layer import AdapterLayer, Tensors
from ..names import AdapterType
from ..registry import register
from ..straight_through import packed_bits, straight_through, unpacked_bits


@dataclass
class PSTConfig(AdapterConfig):
    """PST (arXiv:2205.11005): 2 r (m + n) + m + n trained numbers a matrix, and a mask of m n bits.

    Attributes:
        sparsity: share of zeros at the end.
        total_steps: of the run; zeros come by a cubic between ``warmup`` and ``cooldown``, which are shares of it.
        beta, a1, a2: factors on the change, and on the scores' two parts.
        mask_every: steps between changes of the mask.

    Example:
        >>> from gracile.adapters import PSTConfig
        >>> PSTConfig(r=8, target_modules=["q_proj"], sparsity=0.5, total_steps=1000).share_at(1000)
        0.5
    """

    checks: ClassVar[Mapping[str, Check]] = {
        "sparsity": number("in [0, 1)"),
        "total_steps": whole(1),
        "warmup": number("in [0, 1)"),
        "cooldown": number("in [0, 1)"),
        "beta": finite(),
        "a1": finite(),
        "a2": finite(),
        "mask_every": whole(1),
    }

    without_effect: ClassVar[tuple[str, ...]] = (
        "alpha",
        "dropout",
    )  # beta scales the change, and a mask is over all of W'

    sparsity: float = field(default=0.5, metadata={"help": "Share of zeros at the end."})
    total_steps: int = field(default=1000, metadata={"help": "Steps of the run."})
    warmup: float = field(default=0.1, metadata={"help": "Share of the steps before the first zeros."})
    cooldown: float = field(default=0.3, metadata={"help": "Share of the steps with all zeros, at the end."})
    beta: float = field(default=1.0, metadata={"help": "Factor on the change of the weight."})
    a1: float = field(default=1.0, metadata={"help": "Factor on the scores' part of low rank."})
    a2: float = field(default=1.0, metadata={"help": "Factor on the scores of rows and columns."})
    mask_every: int = field(default=1, metadata={"help": "Steps between changes of the mask."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup + self.cooldown >= 1:
            raise ValueError(f"warmup and cooldown must be below 1 together, got {self.warmup} and {self.cooldown}")

    def share_at(self, step: int) -> float:
        """s_t: the share of zeros after ``step`` steps."""
        begin, length = self.warmup * self.total_steps, (1 - self.warmup - self.cooldown) * self.total_steps
        done = min(1.0, max(0.0, (step - begin) / length))
        return self.sparsity * (1 - (1 - done) ** 3)


@register(AdapterType.PST, PSTConfig)
class PSTLayer(AdapterLayer):
    """A linear layer with PST beside it."""

    prefix, trained, kept = "pst_", ("U", "V", "P", "Q", "R", "C"), ("M",)
    dtypes = MappingProxyType({"M": torch.uint8})

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        generator = self.generator(config)
        U, P = (torch.randn(self.out_features, r, generator=generator) / math.sqrt(r) for _ in range(2))
        V, Q = (torch.zeros(r, self.in_features) for _ in range(2))
        R, C = torch.zeros(self.out_features), torch.zeros(self.in_features)
        M = packed_bits(torch.ones(self.out_features, self.in_features, dtype=torch.bool))
        return {"U": U, "V": V, "P": P, "Q": Q, "R": R, "C": C, "M": M}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        m, n = self.out_features, self.in_features
        bits = (-(-m * n // 8),)
        return {"U": (m, r), "V": (r, n), "P": (m, r), "Q": (r, n), "R": (m,), "C": (n,), "M": bits}

    def delta(self, weight: Tensor, config: Any, **tensors: Tensor) -> Tensor:
        wide = weight + config.beta * tensors["U"] @ tensors["V"]
        mask = unpacked_bits(tensors["M"], (self.out_features, self.in_features))
        scores = self._scores(wide, config, **tensors)
        return straight_through(scores, mask) * wide - weight

    def _scores(self, wide: Tensor, config: Any, **tensors: Tensor) -> Tensor:
        """Z (m x n)."""
        of_lines = tensors["R"][:, None] + tensors["C"]
        return wide.abs() + config.a1 * tensors["P"] @ tensors["Q"] + config.a2 * of_lines

    @torch.no_grad()
    def on_step(self, step: int, adapter: str) -> None:
        config: Any = self.settings[adapter]
        zeros = int(config.share_at(step) * self.out_features * self.in_features)
        if not zeros or step % config.mask_every:
            return
        tensors = self.whole_tensors(adapter)
        wide = self.wide_weight() + config.beta * tensors["U"] @ tensors["V"]
        scores = self._scores(wide, config, **tensors).flatten()
        mask = torch.ones_like(scores, dtype=torch.bool)
        mask[scores.topk(zeros, largest=False).indices] = False
        self.tensors(adapter)["M"].copy_(packed_bits(mask))
