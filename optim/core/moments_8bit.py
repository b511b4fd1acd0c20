"""Any optimizer of ours with its moments in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import FullMatrix, FullShard
from ..distributed.projection import LowRankUpdate
from ..state.blockwise_8bit import closed_state, opened_moments
from .optimizer import Group, NewState, ShardedOptimizer, State


class EightBitMoments(ShardedOptimizer):
    """Before an optimizer among the bases of a class: its rule sees moments in fp32, its state holds codes."""

    def moments(self, shard: FullShard, group: Group) -> NewState:
        shapes = self.rule.state(shard.coordinates_shape, torch.float32, torch.device("meta"), group)
        return closed_state(shapes, shard, shard.parameter.device)

    def direction(self, shard: FullMatrix, group: Group, state: State) -> tuple[Tensor | LowRankUpdate, float]:
        with opened_moments(state, shard) as wide:
            return super().direction(shard, group, wide)

    def plain_direction(self, shard: FullShard, group: Group, state: State) -> tuple[Tensor | LowRankUpdate, float]:
        with opened_moments(state, shard) as wide:
            return super().plain_direction(shard, group, wide)
