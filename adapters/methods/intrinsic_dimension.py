"""Intrinsic dimension: one vector of d numbers moves all weights, through fixed random projections.  Aghajanyan et al.
2020, arXiv:2012.13255, after Li et al. 2018, arXiv:1804.08838.

    v in R^d, trained, zero at first, shared by all matrices;   lambda a number a matrix, 1 at first (SAID)
    W_t <- W_t + lambda_t P_t(v)
    P_t(v) = the first D of  H G Pi H B [v; 0],  over  sqrt(L sum G^2) sqrt(D / L)        D = m n,  Fastfood
    L = 2^ceil(log2 max(D, d));   H Walsh and Hadamard's,  B +-1,  Pi a permutation,  G normal, by a seed a matrix

E ||P_t(v)||^2 = ||v||^2 for every matrix, so small ones move relatively more: what lambda repairs. The dense gradient
of a matrix exists for a moment, as in full fine-tuning; L numbers of three kinds are kept a matrix, made anew by their
seed and not saved. ``dimension_for`` reads d_90 off a row of runs.

Departures: a generator a matrix instead of global ones, whose ports do not agree; the transform in fp32 by plain torch;
weights are not replaced, so that state_dict, tied weights and DDP are as ever. FSDP2 refuses a parameter that blocks
share, so that it must wrap the model as one; ZeRO does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...validation import Check, whole
from ..config import AdapterConfig
from ..layer import AdapterLayer, Tensors
from ..names import AdapterType
from ..registry import register


@dataclass
class IntrinsicDimensionConfig(AdapterConfig):
    """Training in a random subspace (arXiv:2012.13255): d trained numbers for all matrices, and one for each.

    Attributes:
        d: dimension of the subspace.

    Example:
        >>> from gracile.adapters import IntrinsicDimensionConfig
        >>> IntrinsicDimensionConfig(d=200, target_modules=["q_proj"]).save_projection
        False
    """

    checks: ClassVar[Mapping[str, Check]] = {"d": whole(1)}

    without_effect: ClassVar[tuple[str, ...]] = ("r", "alpha")

    d: int = field(default=1000, metadata={"help": "Dimension of the subspace that all matrices share."})
    save_projection: bool = field(default=False, metadata={"help": "Store the projections; they follow from the seed."})


@register(AdapterType.INTRINSICDIMENSION, IntrinsicDimensionConfig)
class IntrinsicDimensionLayer(AdapterLayer):
    """A linear layer that is moved by a vector that all share."""

    prefix, trained, frozen, shared = "intrinsicdimension_", ("v", "lambda"), ("G", "B", "order"), ("v",)
    dtypes = MappingProxyType({"B": torch.int8, "order": torch.int32})

    def check_rank(self, r: int) -> None:
        """There is none."""

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        generator, L = self.generator(config), self._padded(config)
        B = torch.randint(0, 2, (L,), generator=generator, dtype=torch.int8) * 2 - 1
        order = torch.randperm(L, generator=generator, dtype=torch.int32)
        return {**_trained(config), "G": torch.randn(L, generator=generator), "B": B, "order": order}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        L = self._padded(config)
        return {"v": (config.d,), "lambda": (1,), "G": (L,), "B": (L,), "order": (L,)}

    def _padded(self, config: Any) -> int:
        return int(2 ** math.ceil(math.log2(max(self.out_features * self.in_features, config.d))))

    def delta(self, weight: Tensor, config: Any, **tensors: Tensor) -> Tensor:
        G, D = tensors["G"], weight.numel()
        moved = projected(tensors["v"], G, tensors["B"], tensors["order"])[:D] / math.sqrt(D / len(G))
        return (tensors["lambda"] * moved).view_as(weight)


def _trained(config: Any) -> Tensors:
    return {"v": torch.zeros(config.d), "lambda": torch.ones(1)}


def projected(v: Tensor, G: Tensor, B: Tensor, order: Tensor) -> Tensor:
    """H G Pi H B [v; 0] over sqrt(L sum G^2): of L numbers, whose squares are those of v on average."""
    padded = torch.nn.functional.pad(v, (0, len(G) - len(v)))
    turned = hadamard(padded * B)[order.long()]
    return hadamard(G * turned) / torch.sqrt(len(G) * G.square().sum())


def hadamard(x: Tensor) -> Tensor:
    """The Walsh and Hadamard transform of a vector of 2^k numbers, without a factor."""
    half = 1
    while half < len(x):
        pairs = x.view(-1, 2, half)
        x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).flatten()
        half *= 2
    return x


def dimension_for(
    dimensions: Sequence[float], metrics: Sequence[float], full: float, share: float = 0.9
) -> float | None:
    """The smallest d that reaches ``share`` of the metric of full fine-tuning, between those that were tried; None
    where none does. Dimensions rise, and a higher metric is better."""
    goal = share * full
    for i, (d, metric) in enumerate(zip(dimensions, metrics, strict=True)):
        if metric >= goal:
            if i == 0:
                return float(d)
            d0, before = dimensions[i - 1], metrics[i - 1]
            return float(d0 + (d - d0) * (goal - before) / (metric - before))
    return None
