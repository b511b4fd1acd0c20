"""A run built once on the meta device, which takes no memory: bad values show before any data is read."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..build.layers import check_saved, schedule_of
from ..build.model import untrained
from ..build.optimizer import build_optimizer, jagged_schedule
from ..config.arguments import Config
from . import distillation


def check_buildable(config: Config, architecture: PreTrainedConfig) -> None:
    """Build the model, its layers, the optimizer and the schedules of a run.

    Raises:
        BadInput: for what any of them refuses.
    """
    model = untrained(config, architecture)
    optimizer = build_optimizer(model, config.optimizer, config.run)
    schedule_of(model, config)
    check_saved(model, config)
    distillation.check(config, architecture.get_text_config().vocab_size)
    if config.optimizer.lr_restart_every is not None and config.run.max_steps > 0:
        jagged_schedule(config, config.run.max_steps, optimizer)
