"""A mask's places in a flat tensor, to gather from and to scatter to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..distributed import FullShard, WrittenUpdate
from ..numbers import Number, scaled

WORTH_A_RUN = 16  # places side by side


class Places:
    """A mask's weights among those of a flat tensor. Blocks are read in runs of as many as lie side by side wherever
    this process's part begins: several times as fast as one by one."""

    def __init__(self, shard: FullShard, group: dict[str, Any], indices: Tensor) -> None:
        self.indices, self.count = indices, shard.parameter.numel()
        side = group.get("block_size") or 1
        self.run = math.gcd(side, shard.runs.begin, self.count) if side >= WORTH_A_RUN else 1
        self.runs = indices[:: self.run] // self.run if self.run >= WORTH_A_RUN else None

    def of(self, flat: Tensor) -> Tensor:
        if len(self.indices) == self.count:
            return flat
        if self.runs is None:
            return flat.index_select(0, self.indices)
        return flat.view(-1, self.run).index_select(0, self.runs).view(-1)

    def unit(self, most: int) -> int:
        """How many places at most are whole runs."""
        return max(1, most // self.run) * self.run

    def put_(self, flat: Tensor, values: Tensor) -> None:
        """Values in the place of those in the mask."""
        if self.runs is None:
            flat.index_copy_(0, self.indices.long(), values)
        else:
            flat.view(-1, self.run).index_copy_(0, self.runs.long(), values.view(-1, self.run))

    def add_(self, flat: Tensor, values: Tensor, alpha: Number) -> None:
        values, alpha = scaled(values, alpha)
        if len(self.indices) == self.count:
            flat.add_(values, alpha=alpha)
        elif self.runs is None:
            flat.index_add_(0, self.indices, values.to(flat.dtype), alpha=alpha)
        else:
            rows = flat.view(-1, self.run)
            held = rows.index_select(0, self.runs).add_(values.view(-1, self.run), alpha=alpha)
            rows.index_copy_(0, self.runs.long(), held)


@dataclass(frozen=True)
class PlacedUpdate(WrittenUpdate):
    """An update of a mask's weights alone."""

    places: Places
    values: Tensor

    def add_to_weights_(self, weights: Tensor, alpha: Number) -> None:
        self.places.add_(weights.view(-1), self.values, alpha)
