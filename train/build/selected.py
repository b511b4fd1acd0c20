"""A part of the weights that a fine-tuning trains, the others frozen at their values: ``selection`` of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ... import optim
from ...selections import METHODS, selection_groups
from ...selections.registry import selection_method
from ..config.finetune_arguments import FinetuneConfig
from ..config.finetune_checks import refuse_split
from ..engines.layout import Layout
from ..errors import BadInput
from .optimizer import build_optimizer


def check_selection(config: FinetuneConfig) -> None:
    """Refuse a selection that is not known, fields that it has not, and keys that do not go together.

    Raises:
        BadInput: for the first of them.
    """
    chosen = config.model
    if chosen.selection is None:
        if chosen.selection_args is not None:
            raise BadInput(f"selection_args {chosen.selection_args} need a selection: {', '.join(METHODS)}")
        return
    if config.has_adapter:
        raise BadInput("selection trains a part of the weights, and an adapter freezes them all; leave one out")
    try:
        selection_method(chosen.selection, **dict(chosen.selection_args or {}))
    except ValueError as error:
        raise BadInput(f"selection: {error}") from None
    if METHODS[chosen.selection].masked and config.optimizer.optimizer not in ("adamw", "sparse_adamw"):
        raise BadInput(
            f"selection {chosen.selection} is moved by AdamW on its weights, got optimizer "
            f"{config.optimizer.optimizer}; hft goes with any"
        )
    refuse_split(config, Layout.of(config.run).stage)


def check_countable(config: FinetuneConfig) -> None:
    """Refuse, in a plan, a selection of which only the weights say how many there are.

    Raises:
        BadInput: for one by a threshold.
    """
    if "threshold" in (config.model.selection_args or {}):
        raise BadInput(
            f"selection {config.model.selection}: how many weights are below a threshold only the weights tell; plan "
            "with a share in its place, as in --selection_args '{\"share\": 0.1}'"
        )


def freeze_others(model: nn.Module, config: FinetuneConfig) -> None:
    """Before an engine wraps the model: parameters of which nothing is chosen need no gradients."""
    if config.model.selection is not None:
        _groups(model, config)


def build_selected(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """The optimizer of what is chosen, or of all weights."""
    run, chosen = config.run, config.model.selection
    if chosen is None or not METHODS[chosen].masked:
        return build_optimizer(model, config.optimizer, run)
    betas = (run.adam_beta1, run.adam_beta2)
    more = dict(config.optimizer.optimizer_args or {})
    keys: dict[str, Any] = {"lr": run.learning_rate, "betas": betas, "eps": run.adam_epsilon}
    try:
        return optim.SparseAdamW(_groups(model, config), weight_decay=run.weight_decay, **keys, **more)
    except (TypeError, ValueError) as error:
        raise BadInput(str(error)) from None


def selected_numbers(model: nn.Module, config: FinetuneConfig) -> int | None:
    """How many numbers are chosen, before an engine wraps ``model``; None where whole parameters are trained."""
    chosen = config.model.selection
    if chosen is None or not METHODS[chosen].masked:
        return None
    (group,) = _groups(model, config)
    return sum(own.count(p) for p, own in group["selected"].items())


def _groups(model: nn.Module, config: FinetuneConfig) -> Any:
    assert config.model.selection is not None
    given = dict(config.model.selection_args or {})
    if "threshold" in given and next(model.parameters()).is_meta:  # where nothing is counted, it is checked as a share
        given |= {"threshold": None, "share": 1.0}
    try:
        return selection_groups(model, config.model.selection, **given)
    except ValueError as error:
        raise BadInput(f"selection {config.model.selection}: {error}") from None
