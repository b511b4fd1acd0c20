"""The numbers that change from step to step: the count t, the learning rate, and what is made of them.

On the host they are Python's, and a kernel gets them as arguments. In a CUDA graph, which replays the arguments that it
was captured with, and in compiled code, which would be compiled anew for others, they are tensors of one element on the
parameter's device. A step's arithmetic is written once, by operators and by what is here.

On a device they are fp64, as Python's are, where it has that: 1 - b2^t in fp32 is off by 1e-5 at the first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..fp64 import widest

Number = float | Tensor


def count_of(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Number:
    """t: how often a parameter has moved, this step included."""
    step = state["step"]
    if group.get("capturable"):
        return step.to(widest(step.device))
    return step.item()  # lives on the CPU: reading it does not stop a GPU


def decay_of(group: Mapping[str, Any]) -> Number:
    """What a step takes away of each weight: lr * weight_decay."""
    return 0.0 if is_zero(group["weight_decay"]) else group["lr"] * group["weight_decay"]


def is_zero(number: Number) -> bool:
    """Whether nothing is to be done. A tensor is not asked: that would stop the device."""
    return not isinstance(number, Tensor) and number == 0


def root_of(number: Number) -> Number:
    return number.sqrt() if isinstance(number, Tensor) else math.sqrt(number)


def least_of(one: Number, other: Number) -> Number:
    if isinstance(one, Tensor):
        return torch.minimum(one, other) if isinstance(other, Tensor) else one.clamp(max=other)
    return other.clamp(max=one) if isinstance(other, Tensor) else min(one, other)


def add_(tensor: Tensor, other: Tensor, factor: Number) -> Tensor:
    """tensor <- tensor + factor * other."""
    return tensor.addcmul_(other, factor) if isinstance(factor, Tensor) else tensor.add_(other, alpha=factor)


def add_each_(tensors: Sequence[Tensor], others: Sequence[Tensor], factor: Number) -> None:
    """``add_`` of several tensors."""
    if isinstance(factor, Tensor):
        for tensor, other in zip(tensors, others, strict=True):
            tensor.addcmul_(other, factor)
    else:
        torch._foreach_add_(list(tensors), list(others), alpha=factor)


def scaled(tensor: Tensor, factor: Number) -> tuple[Tensor, float]:
    """A tensor times a factor that a kernel would not take, and the factor that is left for it."""
    return (tensor * factor, 1.0) if isinstance(factor, Tensor) else (tensor, factor)
