"""Tensors that never change, made once for each device and shared by all that need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._guards import detect_fake_mode

MOST = 16  # of each kind


class MadeOnce:
    """A function's tensors, remembered by its arguments: not what it makes in a plan, which has no numbers and which a
    run in the same process would take for its own."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.make, self.__doc__ = make, make.__doc__
        self.known: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        if arguments in self.known:
            return self.known[arguments]
        made = self.make(*arguments)
        if detect_fake_mode() is None:
            self.known[arguments] = made
            if len(self.known) > MOST:
                self.known.pop(next(iter(self.known)))
        return made
