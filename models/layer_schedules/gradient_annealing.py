"""AutoSparse's gradient annealing: what pruned weights see of their gradients fades.  Kundu et al. 2023,
arXiv:2304.06941.

    before step number t of T    u   = t / T
                                 a_t = a_0 max((1 + cos(pi u)) / 2, 1 - sigmoid(12 u - 6)), 0 from u = 0.9 on
    every check_every steps      density of each layer <- counted; thresholds held below what would leave too little

The larger of a sigmoid, which stays high for longer, and a cosine, which falls no faster. The paper's method was read
in the code of others who had its text (PQuantML), where a is set once an epoch: at a step it is the same function.
``schedule="cosine"`` is (1 + cos(pi min(1, t / (0.9 T)))) / 2 times a_0. a_t is a function of t and T alone: every
process and a resumed run have the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from ...validation import is_real, is_whole, one_of, require
from ..layers import ThresholdLinear


def _cosine(gone: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * gone))


# what is left of a_0 when a share of the run is gone, of a run whose share is annealed
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "sigmoid_cosine": lambda gone, share: max(_cosine(gone), 1 - 1 / (1 + math.exp(6 - 12 * gone))),
    "cosine": lambda gone, share: _cosine(gone / share),
}


class GradientAnnealing:
    """What a training loop does for a model with ``ThresholdLinear`` layers.

    Args:
        model: with such layers.
        annealing: a_0, from 0, hard thresholds, to 1, straight through.
        annealed_share: of the run, after which a_t is 0.
        schedule: ``sigmoid_cosine``, or ``cosine``.
        min_density: of each layer; what a learned threshold may not fall below. A budget is not touched.
        check_every: steps between counts.

    Raises:
        ValueError: for values out of range, or a model without such layers.
    """

    def __init__(
        self,
        model: nn.Module,
        annealing: float = 0.75,
        annealed_share: float = 0.9,
        min_density: float = 0.01,
        check_every: int = 10,
        schedule: str = "sigmoid_cosine",
    ) -> None:
        one_of(*SCHEDULES)("schedule", schedule)
        require(is_real(annealing) and 0 <= annealing <= 1, "annealing must be a number in [0, 1]", annealing)
        share = is_real(annealed_share) and 0 < annealed_share <= 1
        require(share, "annealed_share must be a number in (0, 1]", annealed_share)
        require(is_real(min_density) and 0 <= min_density <= 1, "min_density must be a number in [0, 1]", min_density)
        counted = is_whole(check_every) and check_every >= 1
        require(counted, "check_every must be a whole number >= 1", check_every)
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, ThresholdLinear)}
        require(bool(self.layers), "model must have ThresholdLinear layers", type(model).__name__)
        self.annealing, self.annealed_share, self.check_every = annealing, annealed_share, check_every
        self.schedule = schedule
        for layer in self.layers.values():
            layer.least = math.ceil(min_density * layer.in_features * layer.out_features)

    def factor(self, number: int, steps: int) -> float:
        """a_t of step ``number`` (from 0) of ``steps``."""
        gone = number / max(1, steps)
        if gone >= self.annealed_share:
            return 0.0
        return self.annealing * SCHEDULES[self.schedule](gone, self.annealed_share)

    def begin(self, step: int, total: int) -> None:
        """Before step ``step`` (from 0) of ``total``. Reads nothing from a device."""
        factor = self.factor(step, total)
        for layer in self.layers.values():
            layer.annealed.fill_(factor)
            layer.counts = step % self.check_every == 0

    def end(self, step: int, total: int) -> None:
        """Nothing is left to do after a step."""

    def loss(self) -> None:
        """Nothing is added to a loss."""

    def metrics(self) -> dict[str, float]:
        """``density``, that of all layers together."""
        return {"density": self.densities()[""]}

    def densities(self) -> dict[str, float]:
        """The share of each layer's weights that was not zero when it was last counted, by name; ``""`` is that of all
        layers together."""
        kept = torch.stack([layer.kept for layer in self.layers.values()]).tolist()  # one stop of the device for all
        sizes = [layer.in_features * layer.out_features for layer in self.layers.values()]
        each = {name: count / size for name, count, size in zip(self.layers, kept, sizes, strict=True)}
        return {**each, "": sum(kept) / sum(sizes)}
