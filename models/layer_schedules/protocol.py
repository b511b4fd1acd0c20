"""What a training loop asks of anything that changes layers from step to step."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LayerSchedule(Protocol):
    """What drives a model's layers over a run.

        for step in range(total):
            schedule.begin(step, total)
            loss of each pass += schedule.loss(), where it is not None
            optimizer.step()
            schedule.end(step + 1, total)

    Everything is a function of the step's number: every process, and a run that is resumed, does the same.
    """

    def begin(self, step: int, total: int) -> None:
        """Before step number ``step`` (from 0) of ``total``."""

    def end(self, step: int, total: int) -> None:
        """When ``step`` of ``total`` steps are done."""

    def loss(self) -> Tensor | None:
        """What is added to the loss of each pass, differentiable; None for nothing."""

    def metrics(self) -> dict[str, float]:
        """What is logged beside the loss. May wait for the device."""
