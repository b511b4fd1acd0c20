"""Which matrices have seen a gradient. Behind a projection that begins with zeros the first ones are zero, and what is
found from them is as good as any: it must not stay for all steps until the next refresh.

No state says so, but moments that are zero still do; they are asked when a run goes on from a checkpoint, and the
gradients of a refresh afterwards: once a step, all at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...fp64 import has_fp64
from ..core.clock import steps_of
from ..core.types import ParamStep
from ..distributed import FullShard, StackedMatrix

NOTHING = 1e-29  # Adafactor's second moments have 1e-30 of no gradient


class FirstGradients:
    """By a matrix's position whether it has seen a gradient, where that is known."""

    def __init__(self) -> None:
        self._seen: dict[int, bool] = {}
        self._looked: dict[int, Tensor] = {}  # in this step: flags on the device

    def forget(self) -> None:
        """States are others now."""
        self._seen.clear()
        self._looked.clear()

    def missing(self, position: int) -> bool:
        """Whether a matrix has moved without a gradient."""
        return not self._seen.get(position, True)

    def seen(self, position: int) -> bool:
        """Whether a matrix is known to have moved by a gradient."""
        return self._seen.get(position, False)

    def recall(self, work: Sequence[ParamStep]) -> None:
        """Ask the moments of matrices that have moved and of which nothing is known. Collective, after loading."""
        unknown = [item for item in work if item.shard.position not in self._seen and steps_of(item.state) > 0]
        self._read({item.shard.position: item.shard.all_reduce_max_(_moved(item)) for item in unknown})

    def look_at(self, G: Tensor, shard: FullShard, usable: Tensor) -> None:
        """Whether a matrix that is being refreshed, or each of a stack, has a gradient, if it may be its first.
        Collective."""
        positions = shard.positions if isinstance(shard, StackedMatrix) else [shard.position]
        unknown = [number for number, position in enumerate(positions) if not self._seen.get(position)]
        if unknown:
            # squares of small numbers are zero in fp32, where that of a one is not
            norms = shard.norm(G, torch.float64) if has_fp64(G.device) else shard.norm(G.ne(0).float())
            flags = (norms.view(-1) > 0) & usable.view(-1)
            self._looked |= {positions[number]: flags[number] for number in unknown}

    def note(self) -> None:
        """Keep what was seen in this step: one read of the device for all matrices."""
        looked, self._looked = self._looked, {}
        self._read(looked)

    def _read(self, flags: Mapping[int, Tensor]) -> None:
        if flags:
            device = next(iter(flags.values())).device
            seen = torch.stack([flag.to(device, torch.float32) for flag in flags.values()]).tolist()
            self._seen |= {position: value > 0 for position, value in zip(flags, seen, strict=True)}


def _moved(item: ParamStep) -> Tensor:
    """One where a moment is not zero; a process may hold none of them."""
    held = [t for key, t in item.state.items() if key.startswith("exp_avg") and t.is_floating_point() and t.numel()]
    largest = [torch.linalg.vector_norm(t, torch.inf).float() for t in held]
    none = torch.zeros((), device=item.shard.device)
    return (torch.stack([none, *largest]).amax() > NOTHING).float()
