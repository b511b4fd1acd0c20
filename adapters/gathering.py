"""Tensors that an engine has split, whole: under FSDP2 with their gradients, under ZeRO 3 without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_away(tensor: Any) -> bool:
    """Whether ZeRO 3 has split a parameter and put it away, which it does outside of its module's forward."""
    return hasattr(tensor, "ds_id") and tensor.numel() != tensor.ds_numel


def is_split(tensor: Any) -> bool:
    """Whether DeepSpeed steps a flat copy of a parameter, or FSDP2 has split it."""
    return any(hasattr(tensor, mark) for mark in ("_hp_mapping", "ds_id", "full_tensor"))


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter, to be read. Collective, where it is split."""
    if is_away(tensor):
        import deepspeed  # peft's own way asks whether transformers was told of it

        with deepspeed.zero.GatheredParameters([tensor]), torch.no_grad():
            return tensor.detach().clone()
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered
