"""What the methods have in common: fields with checks, and groups made of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..optim.sparse.selected import Selection
from ..validation import Check

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """A way to choose weights. ``checks`` has one for each field.

    Attributes:
        masked: whether its groups are for ``SparseAdamW``, and not for any optimizer.
    """

    masked: ClassVar[bool] = True
    checks: ClassVar[Mapping[str, Check]] = {}

    def __post_init__(self) -> None:
        for key, check in self.checks.items():
            check(key, getattr(self, key))

    def groups(self, model: nn.Module) -> Groups:
        """Parameter groups of what is trained; all other parameters of ``model`` that the method decides on get
        ``requires_grad=False``, and what it trains True."""
        raise NotImplementedError


def train_only(model: nn.Module, chosen: Collection[Tensor]) -> None:
    """No other parameter has a gradient."""
    ids = {id(p) for p in chosen}
    for p in model.parameters():
        set_trained(p, id(p) in ids)


def set_trained(p: Tensor, trained: bool) -> None:
    if trained and not p.is_floating_point():
        raise ValueError(f"a parameter of {p.dtype} cannot be trained; load the model without quantization")
    p.requires_grad_(trained)


def masked_group(selected: Mapping[Tensor, Selection], **keys: Any) -> dict[str, Any]:
    """A group for ``SparseAdamW``."""
    return {"params": list(selected), "selected": dict(selected), "outside": "frozen", "drop_fraction": 0.0, **keys}
