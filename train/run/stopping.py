"""Ctrl-C and SIGTERM: a run finishes its step, saves a checkpoint and ends, all processes after the same step.

Before training there is nothing to save, and after it nothing that a checkpoint lacks: there a signal ends the run
where it is. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Of a Ctrl-C a process that was launched hears twice: from the terminal, and from its launcher.
ECHO_SECONDS = 3.0


class Interrupted(KeyboardInterrupt):
    """A run that was asked to end. ``code`` is the exit code that shells give to the signal: 130 or 143."""

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(number, step)
        self.code, self.name, self.step = 128 + number, signal.Signals(number).name, step

    def __str__(self) -> str:
        return f"stopped by {self.name}" + ("" if self.step is None else f" after step {self.step}")


class StopRequests:
    """In the block, a first SIGINT or SIGTERM raises ``Interrupted``, or is kept in ``number`` while ``waiting``."""

    def __init__(self) -> None:
        self.number = 0
        self.waiting = False
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # no other can have handlers
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        launched = "RANK" in os.environ
        if self.number:
            if not launched or time.monotonic() - self._came > ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.number, self._came = number, time.monotonic()
        if not self.waiting:
            raise Interrupted(number)
        if not launched:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)  # also while no line of Python runs


class StopTogether(TrainerCallback):
    """Ends training after the same step on all processes, with a checkpoint, once any of them has a request.

    Of several processes each says at the end of a step what it has received, on a group of its own that waits for no
    GPU, and hears the answer at the end of the next: so nobody waits, and all stop after the same step.
    """

    def __init__(self, requests: StopRequests) -> None:
        self.requests = requests
        self.stopped_by = 0  # the signal
        self._group: Any = None
        self._vote: torch.Tensor | None = None
        self._work: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        self.requests.waiting = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.stopped_by = self.requests.number if self._group is None else self._heard()
        if self.stopped_by:
            control.should_save = control.should_training_stop = True
        elif self._group is not None:
            self._vote = torch.tensor(SIGNALS.index(self.requests.number) + 1 if self.requests.number else 0)
            self._work = dist.all_reduce(self._vote, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.stopped_by and (state.epoch or 0) % 1:  # the Trainer takes a stop for the end of an epoch
            control.should_log = control.should_evaluate = control.should_save = False
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stopped_by = self.stopped_by or self._heard() or (0 if self._group else self.requests.number)
        self.requests.waiting = False

    def _heard(self) -> int:
        """The signal that any process had received at the end of the step before; 0 for none."""
        if self._work is None:
            return 0
        assert self._vote is not None
        self._work.wait()
        self._work = None
        voted = int(self._vote)
        return SIGNALS[voted - 1] if voted else 0
