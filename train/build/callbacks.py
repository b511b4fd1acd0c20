"""What the Trainer calls from step to step: a layer schedule, and evaluations at single steps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...models.layer_schedules.protocol import LayerSchedule


class ScheduleCallback(TrainerCallback):
    """Tells a layer schedule when each optimizer step begins and ends."""

    def __init__(self, schedule: LayerSchedule) -> None:
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.schedule.begin(state.global_step, state.max_steps)
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.schedule.end(state.global_step, state.max_steps)
        return control


class EvaluateAt(TrainerCallback):
    """Evaluates and logs at further steps than the Trainer's strategies do."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = set(steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step in self.steps:
            control.should_evaluate = True
        if control.should_save:
            # A logged loss is the mean since the last log. Logged at each save too, it is the same in a resumed run.
            control.should_log = True
        return control
