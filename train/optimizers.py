"""Optimizers by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..optim import FiraAdamW, GaLoreAdamW, GaLoreLion, Lion, param_groups
from ..validation import nearest
from .config import OptimizerArguments, RunArguments
from .errors import BadInput


def _dense_groups(model: nn.Module, chosen: OptimizerArguments, run: RunArguments) -> list[dict[str, Any]]:
    return param_groups(model, weight_decay=run.weight_decay)


def _low_rank_groups(model: nn.Module, chosen: OptimizerArguments, run: RunArguments) -> list[dict[str, Any]]:
    return param_groups(
        model,
        rank=chosen.rank,
        target_modules=chosen.target_modules,
        weight_decay=run.weight_decay,
        update_proj_gap=chosen.update_proj_gap,
        scale=chosen.scale,
        proj_type=chosen.proj_type,
        subspace_method=chosen.subspace_method,
    )


def _adam_keys(run: RunArguments) -> dict[str, Any]:
    return {**_lion_keys(run), "eps": run.adam_epsilon}


def _lion_keys(run: RunArguments) -> dict[str, Any]:
    return {"lr": run.learning_rate, "betas": (run.adam_beta1, run.adam_beta2)}


class Recipe(NamedTuple):
    """How a class is built from a configuration: its groups and the keys it takes from TrainingArguments."""

    optimizer: Callable[..., torch.optim.Optimizer]
    groups: Callable[[nn.Module, OptimizerArguments, RunArguments], list[dict[str, Any]]]
    keys: Callable[[RunArguments], dict[str, Any]]


OPTIMIZERS = {
    "adamw": Recipe(partial(torch.optim.AdamW, fused=True), _dense_groups, _adam_keys),
    "lion": Recipe(Lion, _dense_groups, _lion_keys),
    "galore_adamw": Recipe(GaLoreAdamW, _low_rank_groups, _adam_keys),
    "galore_lion": Recipe(GaLoreLion, _low_rank_groups, _lion_keys),
    "fira_adamw": Recipe(FiraAdamW, _low_rank_groups, _adam_keys),
}


def build_optimizer(model: nn.Module, chosen: OptimizerArguments, run: RunArguments) -> torch.optim.Optimizer:
    """The optimizer of a run on ``model``'s trainable parameters.

    Raises:
        BadInput: for an unknown name, a value the optimizer refuses or a pattern that matches no layer.
    """
    if chosen.optimizer not in OPTIMIZERS:
        raise BadInput(f"unknown optimizer {chosen.optimizer!r}; {nearest(chosen.optimizer, OPTIMIZERS)}")
    try:
        recipe = OPTIMIZERS[chosen.optimizer]
        return recipe.optimizer(recipe.groups(model, chosen, run), **recipe.keys(run))
    except ValueError as error:
        raise BadInput(str(error)) from None
