"""Of a gradient the entries of a mask, in its place: all that a matrix moves by in a step that leaves its mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.projected_gradient import OUTSIDE, Kept, ProjectedGradient
from ..core.types import ParamStep
from ..distributed import blocked
from .gather_scatter import Places

COLUMNS = 16  # at most, that tell how large the other entries are, which of a sparse matrix are most

LATE = (
    "zero_grad() was not called after the last step, or a group or its state has changed since the backward pass; "
    "change them after step()"
)


def columns_outside(shape: Sequence[int]) -> int:
    """Of a gradient of this shape: no more than half of what its rows have."""
    return min(COLUMNS, max(1, shape[-1] // 2))


@dataclass(frozen=True)
class EntriesOfMask:
    """What a gradient is reduced to in the passes of one step. ``outside`` is of the other entries, by the same random
    columns in all of these passes."""

    places: Places
    seed: int

    def __call__(self, gradient: Tensor) -> Kept:
        entries = self.places.of(gradient.reshape(-1)).clone()
        left = gradient.reshape(-1).clone()
        self.places.put_(left, torch.zeros_like(entries))
        lines = left.view(-1, gradient.shape[-1])
        chance = torch.Generator(gradient.device).manual_seed(self.seed)
        columns = columns_outside(gradient.shape)
        Z = torch.randn((gradient.shape[-1], columns), generator=chance, device=gradient.device)
        Z *= (OUTSIDE / columns) ** 0.5
        parts = torch.split(lines, max(1, blocked.BLOCK // lines.shape[1]))
        return Kept(entries, torch.cat([part.float() @ Z for part in parts]).to(gradient.dtype))


def check_whole(due: Iterable[ParamStep]) -> None:
    """Refuse masks that change by gradients of which entries were kept.

    Raises:
        RuntimeError: for the first of them.
    """
    if any(isinstance(item.shard.held_gradient, ProjectedGradient) for item in due):
        raise RuntimeError(f"a mask changes by a gradient of which its entries were kept: {LATE}")


def entries_of(gradient: Tensor, places: Places) -> Tensor:
    """The entries of a mask, of a gradient or of what was kept of it.

    Raises:
        RuntimeError: for entries of another mask.
    """
    if not isinstance(gradient, ProjectedGradient):
        return places.of(gradient.reshape(-1))
    assert isinstance(gradient.reduce, EntriesOfMask)
    if gradient.reduce.places.indices is not places.indices:
        raise RuntimeError(f"of a gradient the entries of another mask were kept: {LATE}")
    return gradient.kept.coordinates
