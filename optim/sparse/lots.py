"""Matrices that keep all of their weights and moments, moved in lots on a GPU, where a launch costs as much as the
arithmetic of a small matrix: a lot is flat pieces of several, of one group and clock, no more than a workspace has room
for. On a CPU each matrix is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from ..core import batches
from ..core.optimizer import ShardedOptimizer
from ..core.rules import MOMENTS
from ..core.types import Group, ParamStep, State
from ..distributed import blocked, is_large
from ..numbers import add_each_
from ..state.spec import PLAIN
from .frozen_zeros import keep_only_

IN_A_LOT = 2**24  # elements: what is made of each is ten bytes at most, for comparisons and copies in fp32
ALIGNED = 32  # elements: a piece is cut where a vector of a kernel ends, so that it is rounded as it is in the whole


@dataclass(frozen=True)
class Lot:
    """Flat views of weights, gradients and moments, of each as many as there are pieces."""

    items: Sequence[ParamStep]
    spans: Sequence[slice]  # of the elements that this process holds of each
    gradients: Sequence[Tensor]

    @property
    def group(self) -> Group:
        return self.items[0].group

    @property
    def weights(self) -> list[Tensor]:
        return [item.shard.parameter.view(-1)[span] for item, span in zip(self.items, self.spans, strict=True)]

    def held(self, name: str) -> list[Tensor]:
        """A tensor of state that is laid out as the weights."""
        return [item.state[name].view(-1)[span] for item, span in zip(self.items, self.spans, strict=True)]

    def states(self) -> list[State]:
        """The state of each piece, as a rule takes it."""
        moments = zip(*map(self.held, MOMENTS), strict=True)
        return [
            {"step": item.state["step"], **dict(zip(MOMENTS, own, strict=True))}
            for item, own in zip(self.items, moments, strict=True)
        ]

    def parts(self, flat: Tensor) -> list[Tensor]:
        """What belongs to each piece of what was made of all of them."""
        return list(torch.split(flat, [span.stop - span.start for span in self.spans]))


def lots_of(items: Sequence[ParamStep], unit: int = 1) -> Iterator[Lot]:
    """Matrices in lots; a piece of one begins at a multiple of ``unit`` elements."""
    most = max(1, IN_A_LOT // unit) * unit
    cut = lcm(unit, ALIGNED) if lcm(unit, ALIGNED) <= most else unit
    pieces: list[tuple[ParamStep, slice, Tensor]] = []
    room = most
    for item in items:
        G = item.take_grad().reshape(-1)
        begin = 0
        while begin < len(G):
            size = len(G) - begin
            if size > room:  # as much as there is room for
                size = room // cut * cut
            if size:
                span = slice(begin, begin + size)
                pieces.append((item, span, G[span]))
                begin, room = begin + size, room - size
            if begin < len(G):
                yield Lot(*zip(*pieces, strict=True))
                pieces, room = [], most
    if pieces:
        yield Lot(*zip(*pieces, strict=True))


class MovedInLots(ShardedOptimizer):
    """An optimizer that says by ``move_lot`` where a lot goes, and by ``is_plain`` where the rule says it."""

    def is_plain(self, group: Group, state: State) -> bool:
        """Whether a matrix goes where the rule says in this step, and no other way."""
        return False

    def fits_in_lots(self, item: ParamStep) -> bool:
        """Whether pieces of a matrix move as it does."""
        return True

    def unit(self, group: Group) -> int:
        """How many elements of a matrix are together in one piece."""
        return 1

    def move_lot(self, lot: Lot) -> None:
        raise NotImplementedError

    def moves_plainly(self, item: ParamStep) -> bool:
        if not self.is_for_matrices(item.group):
            return super().moves_plainly(item)
        return self.is_plain(item.group, item.state)

    def moves_in_lots(self, item: ParamStep) -> bool:
        if not self.is_for_matrices(item.group) or self.is_plain(item.group, item.state):
            return False
        rounded = self.moment_codec is not PLAIN or item.group["stochastic_rounding"]
        return not rounded and _is_flat(item) and self.fits_in_lots(item)

    writes_by_shards = False

    def piece_size(self, item: ParamStep) -> int:
        """Of a large matrix, too, whose weights are rounded by chance or whose lots are no lots."""
        large = self.is_for_matrices(item.group) and not item.shard.split and is_large(item.shard.shape)
        if not (large and _is_flat(item) and self.fits_in_lots(item)):
            return super().piece_size(item)
        unit = self.unit(item.group)
        return max(1, blocked.BLOCK // unit) * unit

    def move_lots(self, items: list[ParamStep]) -> None:
        for lot in lots_of(items, self.unit(items[0].group)):
            self.move_lot(lot)


def adamw_lot_(optimizer: ShardedOptimizer, lot: Lot, gradient: Tensor | None = None, hold: bool = False) -> None:
    """``frozen_zeros.adamw_`` of a lot; ``gradient`` is flat."""
    weights = lot.weights
    kept = torch.cat(weights) != 0 if hold else None
    R = lot.gradients if gradient is None else lot.parts(gradient)
    move_by_rule_(lot, optimizer, R)
    if kept is not None:
        W = torch.cat(weights)
        keep_only_(W, kept)
        torch._foreach_copy_(weights, lot.parts(W))


def move_by_rule_(lot: Lot, optimizer: ShardedOptimizer, gradients: Sequence[Tensor]) -> None:
    """Weights of a lot, after they have decayed: by a kernel that writes them, where all is of one dtype."""
    rule, group, weights, states = optimizer.rule, lot.group, lot.weights, lot.states()
    clock = batches.clock_of(lot.items[0].state, lot.items[0].shard)
    batches.decay_together(weights, group)
    if len({own[0].dtype for own in (weights, gradients, lot.held(MOMENTS[0]))}) == 1 and rule.in_place is not None:
        rule.in_place(weights, gradients, states, group, clock)
        return
    assert rule.together is not None
    N, correction = rule.together(gradients, states, group, clock)
    add_each_(weights, N, -group["lr"] * correction)


def _is_flat(item: ParamStep) -> bool:
    """Whether weights and state lie in the order of their places."""
    return all(tensor.is_contiguous() for tensor in (item.shard.parameter, *item.state.values()))
