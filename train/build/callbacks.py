"""What goes along with a model's layers from step to step, told of each by the Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...models.layer_schedules.gradient_annealing import GradientAnnealing
from ...models.layer_schedules.mask_decay import MaskDecay
from ...models.layer_schedules.ordered_dropout import OrderedDropout
from . import layers
from ..config.arguments import Config


class Shrinking(TrainerCallback):
    """Ordered factors lose components after some steps."""

    def __init__(self, dropout: OrderedDropout) -> None:
        self.dropout = dropout

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.dropout.shrink(state.global_step)
        return control


class Annealing(TrainerCallback):
    """What pruned weights see of their gradients, before each step."""

    def __init__(self, annealing: GradientAnnealing) -> None:
        self.annealing = annealing

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.annealing.begin(state.global_step, state.max_steps)
        return control


class Masking(TrainerCallback):
    """The masks of each step; after it those of the next one, or for good, which an evaluation sees."""

    def __init__(self, masks: MaskDecay) -> None:
        self.masks = masks

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.masks.at(state.global_step, state.max_steps)
        return control

    on_step_end = on_step_begin


def companion(model: nn.Module, config: Config) -> Shrinking | Annealing | Masking | None:
    """That of the model's layers, if they have one.

    Raises:
        BadInput: for a value that it refuses.
    """
    own = layers.companion(model, config)
    if isinstance(own, OrderedDropout):
        return Shrinking(own)
    if isinstance(own, GradientAnnealing):
        return Annealing(own)
    return None if own is None else Masking(own)
