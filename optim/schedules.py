"""Learning rates for optimizers that start again in the middle of a run."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..validation import is_real, is_whole, require


class JaggedCosineLR(LRScheduler):
    """ReLoRA's schedule: a cosine that falls to zero at each restart and rises again (arXiv:2307.05695).

        c(t)   =  min_ratio + (1 - min_ratio) (1 + cos(pi (t - w) / (T - w))) / 2
        t < w:                          lr * t / w
        s < v steps since a restart:    lr * s / v * c(that restart + v)
        else:                           lr * c(t)

    Args:
        optimizer: as for every torch scheduler; its ``lr`` is the peak.
        total_steps: T.
        warmup_steps: w, of the first rise.
        restart_every: steps between restarts, ReLoRA's ``merge_every``.
        restart_warmup_steps: v, of the rise after a restart.
        min_ratio: of the last learning rate to the peak.
        last_epoch: steps that were taken before, as for every torch scheduler; -1 to begin.

    Raises:
        ValueError: for numbers of steps that do not fit into each other.

    Example:
        >>> from torch import nn
        >>> from gracile.optim import JaggedCosineLR
        >>> optimizer = torch.optim.AdamW(nn.Linear(4, 2).parameters(), lr=1.0)
        >>> schedule = JaggedCosineLR(optimizer, 10, warmup_steps=2, restart_every=5, restart_warmup_steps=1)
        >>> rates = []
        >>> for _ in range(10):
        ...     rates.append(round(schedule.get_last_lr()[0], 2))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.0, 0.5, 1.0, 0.97, 0.87, 0.0, 0.55, 0.38, 0.23, 0.13]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int,
        restart_every: int,
        restart_warmup_steps: int = 100,
        min_ratio: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        require(is_whole(total_steps) and total_steps >= 1, "total_steps must be a whole number >= 1", total_steps)
        first = min(total_steps - 1, restart_every) if is_whole(restart_every) else total_steps - 1
        fits = is_whole(restart_every) and restart_every >= 1
        require(fits, "restart_every must be a whole number >= 1", restart_every)
        fits = is_whole(warmup_steps) and 0 <= warmup_steps <= first
        require(fits, f"warmup_steps must be a whole number from 0 to {first} here", warmup_steps)
        fits = is_whole(restart_warmup_steps) and 0 <= restart_warmup_steps < restart_every
        require(fits, f"restart_warmup_steps must be below restart_every={restart_every}", restart_warmup_steps)
        require(is_real(min_ratio) and 0 <= min_ratio <= 1, "min_ratio must be a number in [0, 1]", min_ratio)
        self.total_steps, self.warmup_steps, self.restart_every = total_steps, warmup_steps, restart_every
        self.restart_warmup_steps, self.min_ratio = restart_warmup_steps, min_ratio
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        since = step % self.restart_every
        if step >= self.restart_every and since < self.restart_warmup_steps:
            return since / self.restart_warmup_steps * self._cosine(step - since + self.restart_warmup_steps)
        return self._cosine(step)

    def _cosine(self, step: int) -> float:
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
