"""BA-LoRA: PiSSA with three terms on the outputs.  Chang et al. 2024, arXiv:2408.04556.

    U, S, V = svd_r(W);   B = U sqrt(S),  A = sqrt(S) V           m x r and r x n, trained
    y = (W - B0 A0) x + B A x
    loss + l1 consistency + l2 diversity + l3 leading             of the logits z, beside those z0 of the base
      of tokens    consistency = KL(p0 || p),  diversity = -H(p),  leading = -(k largest of svd(Z)) / (all of svd(Z))
      of classes   consistency = |z / |z| - z0 / |z0||^2,  diversity = sum of Cov(z)_ij^2, i != j, over C,  leading

As for SORSA what is taken off the weight is kept as frozen factors, so that the base's own logits are a pass with the
adapter switched off, and no second model. Departures from the published code, which raises on such logits: Z is some
tokens with labels by the vocabulary, at most 256 of them; logarithms are log_softmax's; padding is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...validation import Check, number, whole
from ..config import AdapterConfig
from ..factors import svd_factors
from ..layer import LowRankLayer, Tensors
from ..names import AdapterType
from ..output_terms import (
    class_consistency,
    class_diversity,
    leading_share,
    rows_of,
    token_consistency,
    token_entropy,
)
from ..registry import register


@dataclass
class BALoraConfig(AdapterConfig):
    """BA-LoRA (arXiv:2408.04556): r (m + n) trained numbers a matrix, and a pass of the base in each training step.

    Attributes:
        consistency, diversity, leading: weights of the terms; 0 leaves one out, and without the first the base's pass.
        k: singular values that lead.

    Example:
        >>> from gracile.adapters import BALoraConfig
        >>> BALoraConfig(r=16, target_modules=["q_proj"]).diversity
        0.0003
    """

    checks: ClassVar[Mapping[str, Check]] = {
        "consistency": number(">= 0"),
        "diversity": number(">= 0"),
        "leading": number(">= 0"),
        "k": whole(1),
    }

    consistency: float = field(default=1e-4, metadata={"help": "Weight of the distance from the base's outputs."})
    diversity: float = field(default=3e-4, metadata={"help": "Weight of the outputs' lack of diversity."})
    leading: float = field(default=1e-4, metadata={"help": "Weight of the outputs' leading directions."})
    k: int = field(default=3, metadata={"help": "Singular values that lead."})

    @property
    def reads_outputs(self) -> bool:
        return any((self.consistency, self.diversity, self.leading))

    @property
    def reads_base(self) -> bool:
        return self.consistency > 0

    def of_outputs(self, logits: Tensor, base: Tensor | None, labels: Tensor | None) -> Tensor:
        of_classes = logits.dim() == 2
        rows, own = rows_of(logits, labels), None if base is None else rows_of(base, labels)
        term = rows.new_zeros(())
        if own is not None:
            term = term + self.consistency * (class_consistency if of_classes else token_consistency)(rows, own)
        if self.diversity:
            term = term + self.diversity * (class_diversity(rows) if of_classes else -token_entropy(rows))
        return term - self.leading * leading_share(rows, self.k) if self.leading else term


@register(AdapterType.BALORA, BALoraConfig)
class BALoraLayer(LowRankLayer):
    """A linear layer with BA-LoRA's PiSSA beside it."""

    prefix, trained, frozen = "balora_", ("A", "B"), ("A0", "B0")
    adapts_experts = True

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        U, S, V = svd_factors(weight, r, config.seed)
        root = (S / config.scale_of(self.name)).sqrt()
        B, A = U * root, root[:, None] * V
        return {"A": A, "B": B, "A0": A, "B0": B}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        m, n = self.out_features, self.in_features
        return {"A": (r, n), "B": (m, r), "A0": (r, n), "B0": (m, r)}

    def factors(self, config: Any, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        A, B, A0, B0 = (tensors[name] for name in (*self.trained, *self.frozen))
        return torch.cat([B, -B0], dim=1), torch.cat([A, A0])
