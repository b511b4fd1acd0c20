"""Maestro's training of ordered factors: a width drawn before each pass, a penalty, shrinking.  Horvath et al. 2023,
arXiv:2308.14929.

    before step number i    one layer is cut to b of its components; each pair of a layer and a width has its turn,
                            in an order drawn anew when all have had one        sampler "one", the paper's
                            or every layer to a width of its own                sampler "each"
    loss                    + penalty * sum over layers of the norms of their tails
    every shrink_every      layers lose the last components that are too small

All widths of a step are known before it, as a function of ``seed`` and i: a pass that is done again (activation
checkpointing), every pass of an accumulated step and every process see the same. The authors' pass over the whole
model beside the sampled one, whose predictions the sampled one imitates, is not built.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...rng import generator_of
from ...validation import is_real, is_whole, require
from ..layers import OrderedLowRankLinear

SAMPLERS = ("one", "each", "none")


class OrderedDropout:
    """What a training loop does for a model with ``OrderedLowRankLinear`` layers.

    Args:
        model: with such layers.
        sampler: ``one``, ``each`` or ``none``.
        penalty: factor of the hierarchical group lasso; the authors' demo has 1e-6, their options 5e-3.
        shrink_every: steps between shrinkings; 0 for none.
        threshold: of a component's importance, relative to the first one's.
        seed: of the widths.

    Raises:
        ValueError: for values out of range, or a model without such layers.
    """

    def __init__(
        self,
        model: nn.Module,
        sampler: str = "one",
        penalty: float = 1e-6,
        shrink_every: int = 0,
        threshold: float = 1e-5,
        seed: int = 0,
    ) -> None:
        require(sampler in SAMPLERS, f"sampler must be one of {', '.join(SAMPLERS)}", sampler)
        require(is_real(penalty) and penalty >= 0, "penalty must be a number >= 0", penalty)
        counted = is_whole(shrink_every) and shrink_every >= 0
        require(counted, "shrink_every must be a whole number >= 0", shrink_every)
        require(is_real(threshold) and threshold >= 0, "threshold must be a number >= 0", threshold)
        require(is_whole(seed) and seed >= 0, "seed must be a whole number >= 0", seed)
        self.layers = [module for module in model.modules() if isinstance(module, OrderedLowRankLinear)]
        require(bool(self.layers), "model must have OrderedLowRankLinear layers", type(model).__name__)
        self.sampler, self.penalty, self.shrink_every = sampler, penalty, shrink_every
        self.threshold, self.seed = threshold, seed

    def begin(self, step: int, total: int) -> None:
        """Before step ``step`` (from 0): its widths, the same in all of its passes and on all processes."""
        self.draw(step)

    def end(self, step: int, total: int) -> None:
        """When ``step`` steps are done: layers lose components, if it is time."""
        self.shrink(step)

    def draw(self, number: int) -> None:
        """The widths of step ``number`` (from 0)."""
        for layer in self.layers:
            layer.sampled = None
        draws: dict[str, Callable[[int], None]] = {"one": self._draw_one, "each": self._draw_each}
        if self.sampler in draws:
            draws[self.sampler](number)

    def _draw_one(self, number: int) -> None:
        pairs = sum(layer.width for layer in self.layers)
        turn, place = divmod(number, pairs)
        order = torch.randperm(pairs, generator=generator_of(self.seed, "Maestro", pairs, turn), device="cpu")
        chosen = int(order[place])
        for layer in self.layers:
            if chosen < layer.width:
                layer.sampled = chosen + 1
                return
            chosen -= layer.width

    def _draw_each(self, number: int) -> None:
        generator = generator_of(self.seed, "Maestro", number)
        for layer in self.layers:
            layer.sampled = 1 + int(torch.randint(layer.width, (), generator=generator, device="cpu"))

    def loss(self) -> Tensor:
        """What is added to the loss of a pass; differentiable."""
        return self.penalty * torch.stack([layer.penalty() for layer in self.layers]).sum()

    def shrink(self, step: int) -> None:
        """After step ``step`` (from 1): leave components out, if it is time."""
        if self.shrink_every and step % self.shrink_every == 0:
            for layer in self.layers:
                layer.shrink(self.threshold)

    def metrics(self) -> dict[str, float]:
        """Nothing to log."""
        return {}
