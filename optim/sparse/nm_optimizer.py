"""Optimizers of matrices in which n of every m consecutive weights of a row shall stay: their groups, and their masks.

Where an engine cuts a matrix, it may cut between the weights of a group of m. Such a group is completed from its parts,
a few numbers for each process, in one message for all matrices of a step; the rest of a mask is each process's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...nm_pattern import check_pattern, largest
from ..core.optimizer import Group, ParamStep, ShardedOptimizer
from ..core.rules import TORCH_ADAM
from ..distributed import FlatShard, FullShard, RowShard, UnsupportedLayout, complete, full_shape


class NMOptimizer(ShardedOptimizer):
    """AdamW, as torch has it, but for the matrices of groups with an ``n``, which are the method's business."""

    rule = TORCH_ADAM

    def validate(self, group: Group) -> None:
        if group["n"] is not None:
            check_pattern(group["n"], group["m"])

    def _check_parameters(self, group: Group) -> None:
        super()._check_parameters(group)
        if group["n"] is not None:
            entries = (entry[1] if isinstance(entry, tuple) else entry for entry in group["params"])
            for p in entries:
                self._check_shape(full_shape(p), group)

    def _check_shape(self, shape: tuple[int, ...], group: Group) -> None:
        if len(shape) != 2 or shape[1] % group["m"]:
            raise ValueError(
                f"n={group['n']} needs matrices with rows that m={group['m']} divides, got a parameter of shape "
                f"{shape}; put it into a group with n=None (gracile.optim.param_groups does)"
            )

    @classmethod
    def on_paper(cls, parameter: Tensor, keys: dict[str, Any]) -> ShardedOptimizer:
        """An ``n`` holds for matrices."""
        return super().on_paper(parameter, keys if parameter.dim() == 2 else {**keys, "n": None})

    def asks_for_mask(self, work: ParamStep) -> bool:
        """Whether ``update`` will ask for the mask of a matrix: then its cut groups are completed before."""
        raise NotImplementedError

    def _update(self, work: list[ParamStep]) -> None:
        self.complete_groups(item for item in work if item.group["n"] is not None and self.asks_for_mask(item))
        super()._update(work)

    def complete_groups(self, work: Iterable[ParamStep]) -> None:
        """Make ready for ``mask`` of these, as they are now. Collective."""
        self._whole_groups = {
            item.shard.position: _in_groups(item.shard, item.group["m"])
            for item in work
            if isinstance(item.shard, FlatShard)
        }
        views = list(self._whole_groups.values())
        for view, groups in zip(views, complete(views, [view.parameter for view in views]), strict=True):
            view.completed = groups

    def mask(self, shard: FullShard, group: Group) -> Tensor:
        """Where the n largest of every m weights are (bool), laid out as this process holds the matrix."""
        if isinstance(shard, FlatShard):
            view = self._whole_groups[shard.position]
            found = largest(view.grad, group["n"], group["m"]).view(-1)
            lead = view.piece.start - view.lines[0] * group["m"]
            return found[lead : lead + view.piece.numel]
        if shard.parameter.dim() != 2:
            raise UnsupportedLayout(f"a matrix came as a tensor of shape {tuple(shard.parameter.shape)}, without rows")
        return largest(shard.parameter, group["n"], group["m"])


def _in_groups(shard: FlatShard, m: int) -> RowShard:
    """A slice of a matrix as one of its groups of ``m``, each a row; the weights are what it gives as its gradient."""
    piece = replace(shard.piece, shape=(math.prod(shard.shape) // m, m))
    weights: Tensor = shard.parameter
    return RowShard(weights, weights, piece, shard.position, shard.room)
