"""Any optimizer of ours with its moments in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Group, NewState, State, SubspaceOptimizer
from .quantized import closed_state, opened_moments
from .shards import Whole, WholeMatrix
from .subspaces.basis import Lifted


class EightBitMoments(SubspaceOptimizer):
    """Before an optimizer among the bases of a class: its rule sees moments in fp32, its state holds codes."""

    def moments(self, shard: Whole, group: Group) -> NewState:
        shapes = self.rule.state(shard.coordinates_shape, torch.float32, torch.device("meta"), group)
        return closed_state(shapes, shard, shard.parameter.device)

    def direction(self, shard: WholeMatrix, group: Group, state: State) -> tuple[Tensor | Lifted, float]:
        with opened_moments(state, shard) as wide:
            return super().direction(shard, group, wide)

    def plain_direction(self, shard: Whole, group: Group, state: State) -> tuple[Tensor | Lifted, float]:
        with opened_moments(state, shard) as wide:
            return super().plain_direction(shard, group, wide)
