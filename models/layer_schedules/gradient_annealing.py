"""AutoSparse's gradient annealing: what pruned weights see of their gradients fades.  Kundu et al. 2023,
arXiv:2304.06941.

    before step number t of T    a_t = a_0 (1 + cos(pi min(1, t / (0.9 T)))) / 2          in every layer
    every check_every steps      density of each layer <- counted; thresholds held below what would leave too little

The abstract says of a_t only that it falls, not linearly; the cosine is ours, and so is that the last tenth of a run is
without it. a_t is a function of t and T alone: every process and a resumed run have the same.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ...validation import is_real, is_whole, require
from ..layers import ThresholdLinear


class GradientAnnealing:
    """What a training loop does for a model with ``ThresholdLinear`` layers.

    Args:
        model: with such layers.
        annealing: a_0, from 0, hard thresholds, to 1, straight through.
        annealed_share: of the run, after which a_t is 0.
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
    ) -> None:
        require(is_real(annealing) and 0 <= annealing <= 1, "annealing must be a number in [0, 1]", annealing)
        share = is_real(annealed_share) and 0 < annealed_share <= 1
        require(share, "annealed_share must be a number in (0, 1]", annealed_share)
        require(is_real(min_density) and 0 <= min_density <= 1, "min_density must be a number in [0, 1]", min_density)
        counted = is_whole(check_every) and check_every >= 1
        require(counted, "check_every must be a whole number >= 1", check_every)
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, ThresholdLinear)}
        require(bool(self.layers), "model must have ThresholdLinear layers", type(model).__name__)
        self.annealing, self.annealed_share, self.check_every = annealing, annealed_share, check_every
        for layer in self.layers.values():
            layer.least = math.ceil(min_density * layer.in_features * layer.out_features)

    def factor(self, number: int, steps: int) -> float:
        """a_t of step ``number`` (from 0) of ``steps``."""
        gone = min(1.0, number / (self.annealed_share * max(1, steps)))
        return self.annealing * 0.5 * (1 + math.cos(math.pi * gone))

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
