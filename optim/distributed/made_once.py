"""Tensors that never change, made once for each device and shared by all that need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._guards import detect_fake_mode

MOST = 16  # of each kind


class MadeOnce:
    """A function's tensors, remembered by its arguments. What it makes in a plan has no numbers, and a run in the same
    process would take it for its own: that is remembered for this plan, while it is the last."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.make, self.__doc__ = make, make.__doc__
        self.known: dict[tuple[Any, ...], Tensor] = {}
        self.plan: Any = None
        self.planned: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        if arguments in self.known:
            return self.known[arguments]
        remembered = self._remembered()
        if arguments not in remembered:
            remembered[arguments] = self.make(*arguments)
            if len(remembered) > MOST:
                remembered.pop(next(iter(remembered)))
        return remembered[arguments]

    def _remembered(self) -> dict[tuple[Any, ...], Tensor]:
        plan = detect_fake_mode()
        if plan is None:
            return self.known
        if plan is not self.plan:
            self.plan, self.planned = plan, {}
        return self.planned
