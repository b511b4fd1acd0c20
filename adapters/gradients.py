"""Gradients that are changed on their way back, in any dtype, wrapper or compiled graph: no optimizer of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient * scale, None


def scaled_gradient(tensor: Tensor, scale: Tensor) -> Tensor:
    """``tensor`` itself, whose gradient is multiplied by ``scale``, which broadcasts to its shape."""
    scaled: Tensor = _Scaled.apply(tensor, scale)
    return scaled
