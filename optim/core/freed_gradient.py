"""What lies in the place of a gradient that was freed in the backward pass, when its parameter had moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .projected_gradient import local_of

READ = (
    "a gradient was freed in the backward pass, when its parameter had moved, and {what} wants it: clipping by a "
    "global norm, GradScaler and accumulation need all gradients; do without them (max_grad_norm=0, bf16 without a "
    "scaler, one pass a step), or call remove() of what release_gradients returned, or its clipped_backward(), which "
    "clips in two passes"
)
aten = torch.ops.aten
VIEWS = (aten.detach.default, aten.view.default, aten.slice.Tensor)  # which read nothing
SCALED = (aten.mul_.Tensor, aten.mul_.Scalar)
SCALED_EACH = (aten._foreach_mul_.Tensor, aten._foreach_mul_.Scalar)


class FreedGradient(Tensor):
    """Looks like the gradient that was there and knows its norm, which is logged; holds no memory. Raises where it is
    read or written to, but for a factor of one, by which clipping to a norm that is not reached multiplies."""

    norm_then: Tensor
    _one: tuple[Tensor, bool] | None = None  # the last factor, and whether it is one: asked of the device once for all

    @staticmethod
    def __new__(cls, like: Tensor, norm: Tensor, shape: Sequence[int] | None = None) -> FreedGradient:
        made: FreedGradient = Tensor._make_wrapper_subclass(
            cls, like.shape if shape is None else shape, dtype=like.dtype, device=like.device
        )
        made.norm_then = norm
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FreedGradient({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        own, rest = args[0], args[1:]
        if func in VIEWS:
            seen = func(torch.empty(own.shape, device="meta"), *rest, **(kwargs or {}))
            return FreedGradient(own, own.norm_then, seen.shape)
        if func is aten.linalg_vector_norm.default and rest in ((), (2,)):
            return own.norm_then
        if func is aten._foreach_norm.Scalar and rest in ((), (2,)):
            return [gradient.norm_then for gradient in own]
        if func in SCALED and cls._is_one(rest[0]):
            return own
        if func in SCALED_EACH and cls._is_one(rest[0]):
            return None
        raise RuntimeError(READ.format(what=f"torch's {func._schema.name.removeprefix('aten::')}"))

    @classmethod
    def _is_one(cls, factor: Any) -> bool:
        if not isinstance(factor, Tensor):
            return bool(factor == 1)
        if cls._one is None or cls._one[0] is not factor:
            cls._one = factor, bool(factor == 1)
        return cls._one[1]


def is_freed(grad: Tensor | None) -> bool:
    return isinstance(local_of(grad), FreedGradient)
