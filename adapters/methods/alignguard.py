"""AlignGuard-LoRA: LoRA whose change of what alignment rests on is held back.  Das et al. 2025, arXiv:2508.02079.

    W m x n frozen;  A, B as LoRA's, D = s B A
    F = E[G * G],  Q = the k leading eigenvectors of E[G G^T]         of gradients on alignment data, by ``calibrate``
    D_A = Q Q^T D,   D_T = D - D_A                                    or of two pairs, D_A = s B1 A1, D_T = s B2 A2
    loss + l_a sum F * D_A^2 + l_t sum D_T^2 + l_c (mix overlap + (1 - mix) angle)       the mean over layers
      overlap = sum (1 + beta sigmoid(|W + D| - tau)) |D_A * D_T|,   angle = <D_A, D_T>^2 / (|D_A|^2 |D_T|^2)

The formulas are from the abstract and a review; the code could not be read. Our choices: the projector is on the output
side, from the covariance of gradients; F is scaled to a mean of one; tau is the median of |W|. With one pair the angle
is zero, for the parts are orthogonal, and is left out. D is formed once a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...validation import Check, number, one_of, whole
from ..config import AdapterConfig
from ..layer import LowRankLayer, Tensors
from ..names import AdapterType
from ..registry import register
from ..weight_terms import angle_term, fisher_term, overlap_term


@dataclass
class AlignGuardConfig(AdapterConfig):
    """AlignGuard-LoRA (arXiv:2508.02079): r (m + n) trained numbers a matrix and pair. ``calibrate`` on alignment data
    comes first.

    Attributes:
        k: directions of the output that alignment rests on.
        pairs: 1, or 2 for parts with factors of their own.
        l_a, l_t, l_c: weights of the terms.
        mix: the overlap's share of the last one.
        beta: how much more the overlap of active weights weighs.

    Example:
        >>> from gracile.adapters import AlignGuardConfig
        >>> AlignGuardConfig(r=16, target_modules=["q_proj"], pairs=2).k
        32
    """

    checks: ClassVar[Mapping[str, Check]] = {
        "k": whole(1),
        "pairs": one_of(1, 2),
        "l_a": number(">= 0"),
        "l_t": number(">= 0"),
        "l_c": number(">= 0"),
        "mix": number("in [0, 1]"),
        "beta": number(">= 0"),
    }

    calibrated_on: ClassVar[str] = "forgetting"

    k: int = field(default=32, metadata={"help": "Directions of the output that alignment rests on."})
    pairs: int = field(default=1, metadata={"help": "1, or 2 for parts with factors of their own."})
    l_a: float = field(default=0.1, metadata={"help": "Weight of the alignment's part."})
    l_t: float = field(default=0.01, metadata={"help": "Weight of the task's part."})
    l_c: float = field(default=0.01, metadata={"help": "Weight of what the parts have in common."})
    mix: float = field(default=0.5, metadata={"help": "The overlap's share of that, beside the angle's."})
    beta: float = field(default=1.0, metadata={"help": "How much more the overlap of active weights weighs."})

    def statistic(self, gradient: Tensor) -> Tensor:
        """What is averaged over batches: G G^T and G * G, side by side (m x (m + n))."""
        return torch.cat([gradient @ gradient.mT, gradient.square()], dim=1)


@register(AdapterType.ALIGNGUARD, AlignGuardConfig)
class AlignGuardLayer(LowRankLayer):
    """A linear layer with AlignGuard-LoRA beside it."""

    prefix, trained, frozen, needs_statistics = "alignguard_", ("A", "B"), ("Q", "F"), True

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        m, n = weight.shape
        found = config.statistics[self.name].to(weight.device)
        Q = torch.linalg.eigh(found[:, :m]).eigenvectors[:, -min(config.k, m) :]
        F = found[:, m:] / found[:, m:].mean().clamp_min(torch.finfo(found.dtype).tiny)
        A = torch.empty(config.pairs * r, n)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=self.generator(config))
        return {"A": A, "B": torch.zeros(m, config.pairs * r), "Q": Q.contiguous(), "F": F.contiguous()}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        m, n, wide = self.out_features, self.in_features, config.pairs * r
        return {"A": (wide, n), "B": (m, wide), "Q": (m, min(config.k, m)), "F": (m, n)}

    def factors(self, config: Any, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        return tensors["B"], tensors["A"]

    def parts(self, config: Any, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """D_A and D_T (m x n)."""
        A, B, Q, scale = tensors["A"], tensors["B"], tensors["Q"], config.scale_of(self.name)
        if config.pairs == 2:
            r = len(A) // 2
            return scale * B[:, :r] @ A[:r], scale * B[:, r:] @ A[r:]
        D = scale * B @ A
        D_A = Q @ (Q.mT @ D)
        return D_A, D - D_A

    def penalty(self, config: Any, **tensors: Tensor) -> Tensor:
        D_A, D_T = self.parts(config, **tensors)
        term = config.l_a * fisher_term(D_A, tensors["F"]) + config.l_t * D_T.square().sum()
        return term + config.l_c * self._in_common(config, D_A, D_T) if config.l_c else term

    def _in_common(self, config: Any, D_A: Tensor, D_T: Tensor) -> Tensor:
        overlap: Tensor = config.mix * overlap_term(D_A, D_T, self.wide_weight(), config.beta)
        return overlap if config.pairs == 1 else overlap + (1 - config.mix) * angle_term(D_A, D_T)
