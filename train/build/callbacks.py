"""What the Trainer calls from step to step: a layer schedule, evaluations at single steps, and lines of a log."""

from __future__ import annotations

from typing import Any, ClassVar

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


class LogLines(TrainerCallback):
    """A line for each thing that is logged, where there is no terminal for progress bars."""

    NAMES: ClassVar[dict[str, str]] = {
        "loss": "loss", "eval_loss": "validation loss", "eval_accuracy": "accuracy",
        "forgetting_loss": "loss on other data", "grad_norm": "grad norm", "learning_rate": "lr",
    }  # fmt: skip

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        told = {**(logs or {})}
        shown = [f"{name} {float(told[key]):.4g}" for key, name in self.NAMES.items() if key in told]
        shown += [f"{key} {value:.4g}" for key, value in told.items() if key.startswith("art_") or key == "density"]
        if shown and state.is_world_process_zero:
            print(f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}", flush=True)
