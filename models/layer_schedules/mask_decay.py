"""Masks that come gradually: from a dense layer to N of every M.  Bambhaniya et al. 2024, arXiv:2402.04744.

    T steps:   dense             until t0 = dense T
               a decay           until t1 = T - fine_tune T,   u = (t - t0) / (t1 - t0) of it is over
               the pattern       until the end

    "linear"        F = P + (1 - P) b,   b = 1 - u                      mask decay: what is pruned fades
    "exponential"                        b = exp(-u ln 1000)
    "sparsify"      patterns in turn, of equal time: M-1:M, M/2:M, M/4:M, ... N:M           1:8 is 7:8, 4:8, 2:8, 1:8
    "fine"                                          2^k N : 2^k M, ... 2N:2M, N:M           1:8 is 8:64, 4:32, 2:16, 1:8
    "none"          the pattern from the start

Everything is a function of the step's number: a run that goes on sees what it would have seen. (The authors keep N and
M in the layers and change them where an epoch's number is met, which a resumed run jumps over.) The decays' lengths and
rates are not to be had from the paper's abstract and code: those here are our choices, and b ends at a thousandth.
"""

from __future__ import annotations

from torch import nn

from ...nm_pattern import MOST
from ...validation import is_real, is_whole, require
from ..layers import NMLinear

DECAYS = ("linear", "exponential", "sparsify", "fine", "none")
LEAST = 1e-3  # where the exponential decay ends


class MaskDecay:
    """What a training loop does for a model with ``NMLinear`` layers: ``at(step, total_steps)`` before each step, and
    after the last.

    Args:
        model: with such layers, which keep their patterns n:m.
        decay: ``linear``, ``exponential``, ``sparsify``, ``fine`` or ``none``.
        dense: the part of the steps before the decay.
        fine_tune: the part after it.
        frames: how many patterns of ``sparsify`` or ``fine`` have their turn, the last ones; None for all.

    Raises:
        ValueError: for values out of range, a model without such layers, or a pattern that does not divide a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: str = "linear",
        dense: float = 0.05,
        fine_tune: float = 0.2,
        frames: int | None = None,
    ) -> None:
        require(decay in DECAYS, f"decay must be one of {', '.join(DECAYS)}", decay)
        for name, part in (("dense", dense), ("fine_tune", fine_tune)):
            require(is_real(part) and 0 <= part <= 1, f"{name} must be a number in [0, 1]", part)
        require(dense + fine_tune <= 1, f"fine_tune and dense={dense} must not exceed 1 together", fine_tune)
        counted = frames is None or (is_whole(frames) and frames >= 1)
        require(counted, "frames must be a whole number >= 1 or None", frames)
        layers = [module for module in model.modules() if isinstance(module, NMLinear)]
        require(bool(layers), "model must have NMLinear layers", type(model).__name__)
        self.decay, self.dense, self.fine_tune = decay, dense, fine_tune
        self.frames = [(layer, patterns(decay, layer.n, layer.m)[-(frames or 0) :]) for layer in layers]
        for layer, held in self.frames:
            most = max(m for _, m in held)
            fits = all(layer.in_features % m == 0 for _, m in held)
            require(fits, f"in_features must be a multiple of {most}, where {decay} begins, or frames less", layer)

    def begin(self, step: int, total: int) -> None:
        """Before step ``step`` (from 0): its masks."""
        self.at(step, total)

    def end(self, step: int, total: int) -> None:
        """When ``step`` steps are done: the masks of the next one, or for good, which an evaluation sees."""
        self.at(step, total)

    def loss(self) -> None:
        """Nothing is added to a loss."""

    def metrics(self) -> dict[str, float]:
        """Nothing to log."""
        return {}

    def at(self, step: int, total_steps: int) -> None:
        """The masks of step ``step`` (from 0) of ``total_steps``; after the last one, the patterns themselves."""
        begins, ends = round(self.dense * total_steps), total_steps - round(self.fine_tune * total_steps)
        over = self.decay == "none" or step >= ends
        progress = 1.0 if over else max(0, step - begins) / max(1, ends - begins)
        residue = 1.0 if step < begins and not over else self._residue(progress)
        for layer, held in self.frames:
            layer.residue = residue
            layer.pattern = held[min(int(progress * len(held)), len(held) - 1)]

    def _residue(self, progress: float) -> float:
        """b, when ``progress`` of the decay is over."""
        if progress >= 1 or self.decay not in ("linear", "exponential"):
            return 0.0
        return 1 - progress if self.decay == "linear" else LEAST**progress


def patterns(decay: str, n: int, m: int) -> list[tuple[int, int]]:
    """What has its turn on the way from a dense layer to n:m, which is the last."""
    if decay == "sparsify":
        halves = [m - 1, *(m >> k for k in range(1, m.bit_length()))]
        return [*((kept, m) for kept in halves if kept > n), (n, m)]
    if decay == "fine":
        doubled = range(m.bit_length() - 1, 0, -1)
        return [*((n << k, m << k) for k in doubled if m << k <= MOST), (n, m)]
    return [(n, m)]
