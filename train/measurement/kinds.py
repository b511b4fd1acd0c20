"""Kinds of memory, planned and measured under the same names."""

from __future__ import annotations

import torch

from ...optim.memory import ERRORS, INDICES, MOMENTS, PROJECTORS

FROZEN, WEIGHTS, MASTER, GRADIENTS, BUFFERS = "frozen weights", "weights", "master weights", "gradients", "buffers"
ACTIVATIONS, TEMPORARY, STEP = "activations", "temporary", "optimizer's step"
STATE = (MOMENTS, PROJECTORS, ERRORS, INDICES)
KINDS = (FROZEN, WEIGHTS, MASTER, GRADIENTS, *STATE, BUFFERS, ACTIVATIONS, TEMPORARY, STEP)

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def short_name(dtype: torch.dtype | None) -> str:
    """Of a dtype of moments, as papers call it."""
    return "none" if dtype is None else SHORT.get(dtype, f"{8 * dtype.itemsize} bits")
