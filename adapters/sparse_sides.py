"""What SparseLoRA's parts have in common: some rows or columns of a matrix with its LoRA, and what it will make of its
input, predicted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .factors import svd_factors


class Owner(Protocol):
    """What a part asks of the ``SparseLora`` that it belongs to."""

    kept: dict[str, Tensor]

    @property
    def is_on(self) -> bool:
        """Whether this step is sparse."""

    def without_labels(self, x: Tensor) -> Tensor:
        """Which of the tokens of x are sparse."""


@dataclass
class Side:
    """One matrix (m x n): its weight and bias, and the factors of its LoRA, each with its scale."""

    weight: Tensor
    bias: Tensor | None
    loras: list[tuple[Tensor, Tensor, float, nn.Module]]

    @classmethod
    def of(cls, module: Any) -> Side:
        if not isinstance(module, LoraLinear):
            return cls(module.weight, module.bias, [])
        base: Any = module.get_base_layer()
        active = [] if module.disable_adapters or module.merged else module.active_adapters
        loras: list[Any] = [
            (module.lora_A[a].weight, module.lora_B[a].weight, module.scaling[a], module.lora_dropout[a])
            for a in active
            if a in module.lora_A
        ]
        return cls(base.weight, base.bias, loras)

    def rows(self, x: Tensor, S: Tensor) -> Tensor:
        """Outputs S of x (tokens x n)."""
        y = F.linear(x, self.weight[S], None if self.bias is None else self.bias[S])
        for A, B, scale, dropout in self.loras:
            y = y + scale * F.linear(F.linear(dropout(x).to(A.dtype), A), B[S]).to(y.dtype)
        return y

    def columns(self, x: Tensor, S: Tensor) -> Tensor:
        """All outputs of inputs S, which are x (tokens x S)."""
        y = F.linear(x, self.weight[:, S], self.bias)
        for A, B, scale, dropout in self.loras:
            y = y + scale * F.linear(F.linear(dropout(x).to(A.dtype), A[:, S]), B).to(y.dtype)
        return y


def check_side(module: Any, name: str) -> None:
    """Refuse a matrix that is more than a weight and plain LoRA.

    Raises:
        ValueError: for another adapter, a variant of LoRA such as DoRA, or a quantized weight.
    """
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not base.weight.is_floating_point():
        raise ValueError(f"model must not be quantized, for rows of {name} are taken out of its weights")
    if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLinear):
        raise ValueError(f"model must have peft's LoRA and no other adapter, and {name} has {type(module).__name__}")
    if isinstance(module, LoraLinear) and (module.lora_variant or any(module.lora_bias.values())):
        raise ValueError(f"model must have plain LoRA, and {name} has a variant of it or a bias; take the dense one")


class Prediction:
    """What a matrix makes of its input, by its leading ``rank`` directions; frozen, without LoRA."""

    def __init__(self, module: Any, rank: int) -> None:
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        U, S, V = svd_factors(base.weight, min(rank, *base.weight.shape))
        self.left, self.right = U * S.sqrt(), S.sqrt()[:, None] * V
        self.bias = None if base.bias is None else base.bias.detach().float()

    def __call__(self, tokens: Tensor) -> Tensor:
        return F.linear(F.linear(tokens.float(), self.right), self.left, self.bias)


def merged(x: Tensor, sparse: Tensor, some: Tensor, dense: Callable[[Tensor], Tensor]) -> Tensor:
    """Outputs (... x m) of all tokens of x (... x n): ``some`` (tokens x m) of those that are ``sparse``, ``dense`` of
    the others."""
    shape = (*x.shape[:-1], some.shape[-1])
    if len(some) == sparse.numel():
        return some.view(shape)
    mask = sparse[..., None]
    return some.new_empty(shape).masked_scatter(~mask, dense(x[~sparse])).masked_scatter(mask, some)
