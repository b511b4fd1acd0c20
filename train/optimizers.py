"""Optimizers by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..optim import GaLoreAdamW, param_groups
from ..validation import nearest
from .config import OptimizerArguments, RunArguments
from .errors import BadInput


def _adamw(model: nn.Module, chosen: OptimizerArguments, run: RunArguments) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, weight_decay=run.weight_decay), fused=True, **_adam_keys(run))


def _galore_adamw(model: nn.Module, chosen: OptimizerArguments, run: RunArguments) -> torch.optim.Optimizer:
    groups = param_groups(
        model,
        rank=chosen.rank,
        target_modules=chosen.target_modules,
        weight_decay=run.weight_decay,
        update_proj_gap=chosen.update_proj_gap,
        scale=chosen.scale,
        proj_type=chosen.proj_type,
    )
    return GaLoreAdamW(groups, **_adam_keys(run))


def _adam_keys(run: RunArguments) -> dict[str, Any]:
    return {"lr": run.learning_rate, "betas": (run.adam_beta1, run.adam_beta2), "eps": run.adam_epsilon}


Builder = Callable[[nn.Module, OptimizerArguments, RunArguments], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Builder] = {"adamw": _adamw, "galore_adamw": _galore_adamw}


def build_optimizer(model: nn.Module, chosen: OptimizerArguments, run: RunArguments) -> torch.optim.Optimizer:
    """The optimizer of a run on ``model``'s trainable parameters.

    Raises:
        BadInput: for an unknown name, a value the optimizer refuses or a pattern that matches no layer.
    """
    if chosen.optimizer not in OPTIMIZERS:
        raise BadInput(f"unknown optimizer {chosen.optimizer!r}; {nearest(chosen.optimizer, OPTIMIZERS)}")
    try:
        return OPTIMIZERS[chosen.optimizer](model, chosen, run)
    except ValueError as error:
        raise BadInput(str(error)) from None
