"""A run built once on the meta device, which takes no memory: bad values show before any data is read."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, get_scheduler

from ..build.layers import check_saved, schedule_of
from ..build.model import untrained
from ..build.optimizer import build_optimizer, jagged_schedule
from ..config.arguments import AnySettings, Config, RunArguments
from ..config.checks import check_sizes
from ..errors import BadInput
from . import distillation


def check_buildable(config: Config, architecture: PreTrainedConfig) -> None:
    """Build the model, its layers, the optimizer and the schedules of a run.

    Raises:
        BadInput: for what any of them refuses.
    """
    check_sizes(config, architecture)
    model = untrained(config, architecture)
    optimizer = checked_optimizer(model, config)
    schedule_of(model, config)
    check_saved(model, config)
    distillation.check(config, architecture.get_text_config().vocab_size)
    if config.optimizer.lr_restart_every is not None:
        if config.run.max_steps > 0:
            jagged_schedule(config, config.run.max_steps, optimizer)
    else:
        check_schedule(config.run, optimizer)


def checked_optimizer(model: nn.Module, config: AnySettings) -> torch.optim.Optimizer:
    """The optimizer of a run on ``model``, made once.

    Raises:
        BadInput: for what it refuses, or a rank that no target matrix has.
    """
    optimizer = build_optimizer(model, config.optimizer, config.run)
    _check_rank(optimizer)
    return optimizer


def _check_rank(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a rank that no target matrix has: the state of such a subspace is larger than that of AdamW."""
    for group in optimizer.param_groups:
        sides = [min(p.shape) for p in group["params"] if p.dim() == 2]
        rank = group.get("rank")
        if rank is not None and sides and rank > max(sides):
            raise BadInput(f"rank is {rank} but the target matrices have at most {max(sides)}; give a smaller rank")


def check_schedule(run: RunArguments, optimizer: torch.optim.Optimizer) -> None:
    """Make the learning rate's schedule once."""
    steps, given = max(run.max_steps, 1), run.lr_scheduler_kwargs or {}
    if isinstance(given, str):  # TrainingArguments reads only text that begins with a brace
        raise BadInput(f"lr_scheduler_kwargs must be a mapping, got {given!r}")
    try:
        get_scheduler(run.lr_scheduler_type, optimizer, run.get_warmup_steps(steps), steps, dict(given))
    except (TypeError, ValueError, KeyError) as error:
        kind = getattr(run.lr_scheduler_type, "value", run.lr_scheduler_type)
        reason = " ".join(str(error).split())
        raise BadInput(f"lr_scheduler_type {kind} with lr_scheduler_kwargs {given} cannot be made: {reason}") from None
