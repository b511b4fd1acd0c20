"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from statistics import median
from typing import Any

import torch

from ...optim.core.optimizer import EARLY, FIND, ShardedOptimizer

FORWARD, BACKWARD, OPTIMIZER, REFRESH, DATA, OTHER = "forward", "backward", "optimizer", "refresh", "data", "other"
PHASES = (FORWARD, BACKWARD, OPTIMIZER, REFRESH, DATA, OTHER)


class PhaseTimer:
    """Seconds of each phase of each step. A phase inside another is taken from it: a refresh from its step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._inner = [0.0]
        self._began: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = _time()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole = _time() - begin
            self._now[name] += whole - self._inner.pop()
            self._inner[-1] += whole

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time is that of phase ``name``."""

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **keywords)

        return call

    def listen_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Time an optimizer's steps and, of one of gracile, the refreshes in them: new subspaces and masks."""
        open_phases = ExitStack()
        optimizer.register_step_pre_hook(lambda *_: open_phases.enter_context(self.phase(OPTIMIZER)))
        optimizer.register_step_post_hook(lambda *_: open_phases.close())
        if not isinstance(optimizer, ShardedOptimizer):
            return
        optimizer.phase_listener = self.listener

    def listener(self, name: str) -> AbstractContextManager[None]:
        """What ``ShardedOptimizer.phase_listener`` is: "find" is emitted in steps with a refresh only, and "early" in
        backward passes."""
        named = {FIND: REFRESH, EARLY: OPTIMIZER}.get(name)
        return nullcontext() if named is None else self.phase(named)

    def step_has_ended(self) -> None:
        """From the end of one step to the end of the next: what no phase took is ``other``."""
        now = _time()
        if self._began is not None:
            self._now[OTHER] = now - self._began - sum(self._now.values())
            self.steps.append(self._now)
        self._now, self._began = defaultdict(float), now

    def medians(self) -> dict[str, float]:
        """Seconds of each phase in a step; of ``refresh``, in those steps that had one."""
        found = {name: median(step[name] for step in self.steps) for name in PHASES}
        refreshes = [step[REFRESH] for step in self.steps if step[REFRESH] > 0]
        return found | {REFRESH: median(refreshes) if refreshes else 0.0}


def _time() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # else kernels that were only queued would count for who waits for them
    return time.perf_counter()
