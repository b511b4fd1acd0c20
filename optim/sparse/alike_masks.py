"""Masks of matrices that are alike, changed together on a GPU, where a launch costs as much as the work of a small
matrix, and no number is read back that is known.

B whole matrices of one shape, group and clock are one B x mn tensor; their masks, of other lengths each, are one mask
of its places, whose weights follow one another as those of the matrices do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import batches
from ..core.batches import launches_cost
from ..core.rules import MOMENTS
from .frozen_weights import START, is_frozen_outside
from .grown_weights import BORN
from .masks import Change, Masked
from .structured_masks import least_salient
from .top_k import keys_of, mixed, places_of

# budgets and counts; what ``random`` makes of places; of rows, the fewest salient weights that keep one, and which of
# them, from the best on, stays in any case
COLUMNS = (
    "budget", "keep", "grow", "drop salt", "drop factor", "grow salt", "grow factor", "least", "last"
)  # fmt: skip


class Wanted(NamedTuple):
    """A matrix whose mask changes: how many units it has in the end, keeps and grows."""

    matrix: Masked
    budget: int
    keep: int
    grow: int


class Alike:
    """Matrices as one tensor; ``numbers`` (B x ..., int64) has on their device what ``COLUMNS`` say of each."""

    def __init__(self, wanted: Sequence[Wanted], numbers: Tensor) -> None:
        self.wanted, self.numbers = wanted, numbers
        self.matrices = [own.matrix for own in wanted]
        self.group, self.shape = self.matrices[0].group, self.matrices[0].shape
        self.count, self.size = len(wanted), math.prod(self.shape)

    def column(self, name: str) -> Tensor:
        """Of each matrix (B x 1)."""
        at = COLUMNS.index(name)
        return self.numbers[:, at : at + 1]

    def counts(self, name: str) -> tuple[list[int], Tensor]:
        """What to keep or to grow of each matrix, here and on the device."""
        return [getattr(own, name) for own in self.wanted], self.column(name)

    @cached_property
    def last_first(self) -> Tensor:
        """The places of a matrix (mn) from the last on."""
        return torch.arange(self.size - 1, -1, -1, device=self.numbers.device)

    @cached_property
    def weights(self) -> Tensor:
        """A copy (B x mn)."""
        return torch.stack([matrix.weights for matrix in self.matrices])

    def gradients(self) -> Tensor:
        return torch.stack([matrix.gradient for matrix in self.matrices])

    @cached_property
    def places(self) -> Tensor:
        """The weights of all masks, by their places among all of B mn (int32, ascending)."""
        begins = [i * self.size for i in range(self.count)]
        return torch.cat(torch._foreach_add([matrix.indices for matrix in self.matrices], begins))

    @cached_property
    def there(self) -> Tensor:
        """The masks (B x mn, bool)."""
        there = torch.zeros(self.count * self.size, dtype=torch.bool, device=self.places.device)
        return there.index_fill_(0, self.places.long(), True).view(self.count, self.size)

    def drop_scores(self) -> Tensor | None:
        """``Masked.drop_scores`` of all weights (B x mn), of magnitudes the sign left. Not to be written to."""
        if self.group["drop"] == "random":
            return None
        if self.group["drop"] == "magnitude":
            return self.weights
        worth = self.weights.abs().to(torch.promote_types(self.weights.dtype, torch.float32))
        return worth.add_(self.gradients().abs_(), alpha=self.group["drop_lambda"])

    def grow_scores(self) -> Tensor | None:
        """``Masked.grow_scores`` of all weights (B x mn)."""
        if self.group["grow"] == "random":
            return None
        if self.group["grow"] == "momentum":
            return torch.stack([matrix.state["momentum"] for matrix in self.matrices])
        return self.gradients()

    def drop_keys(self) -> Tensor:
        """Of the masks' weights; others are out (B x mn)."""
        worth = self.drop_scores()
        keys = self.drawn("drop", self.size) if worth is None else keys_of(worth.float())
        return keys.masked_fill_(self.there.logical_not(), -1)

    def grow_keys(self) -> Tensor:
        worth = self.grow_scores()
        return self.drawn("grow", self.size) if worth is None else keys_of(worth.float())

    def drawn(self, purpose: str, units: int) -> Tensor:
        """Random keys (B x units)."""
        places = torch.arange(units, device=self.numbers.device)
        return mixed(places, self.column(f"{purpose} salt"), self.column(f"{purpose} factor"))


# ---- batches ---------------------------------------------------------------------------------------------------------


def is_whole(matrix: Masked) -> bool:
    """Whether a matrix may be changed with others: where launches cost, and no other process has a part of it."""
    return (
        launches_cost(matrix.device)
        and not matrix.shard.split
        and matrix.key_dtype == torch.int32
        and len(matrix.indices) > 0
        and matrix.size <= batches.AT_ONCE
        and not (matrix.expert is not None and matrix.group["reinit_when_same"])
    )


def alike(wanted: Sequence[Wanted]) -> Iterator[Alike]:
    """Matrices in batches. The device is told its numbers once."""
    lots: list[list[Wanted]] = []
    open_ones: dict[tuple[object, ...], list[Wanted]] = {}
    for own in wanted:
        lot = open_ones.get(kind := _kind(own.matrix))
        if lot is None or (len(lot) + 1) * own.matrix.size > batches.AT_ONCE:
            open_ones[kind] = lot = []
            lots.append(lot)
        lot.append(own)
    if not lots:
        return
    rows = [_numbers(own) for lot in lots for own in lot]
    numbers = torch.tensor(rows, dtype=torch.int64).to(lots[0][0].matrix.device)
    for lot, part in zip(lots, torch.split(numbers, [len(lot) for lot in lots]), strict=True):
        yield Alike(lot, part)


def _kind(matrix: Masked) -> tuple[object, ...]:
    group, held = matrix.group, matrix.shard.held_gradient
    assert held is not None
    dtypes = [
        matrix.shard.parameter.dtype,
        held.dtype,
        *(own.dtype for key, own in matrix.state.items() if key != "step"),
    ]
    return matrix.shape, matrix.expert is None, group["group_number"], matrix.clock, matrix.device, *dtypes


def _numbers(own: Wanted) -> list[int]:
    salts: list[int] = []
    for purpose in ("drop", "grow"):
        by_chance = own.matrix.group[purpose] == "random"
        salts += own.matrix.salt(purpose, own.matrix.clock) if by_chance else (0, 0)
    return [own.budget, own.keep, own.grow, *salts, *least_salient(own.matrix, own.budget)]


# ---- going over to new masks -----------------------------------------------------------------------------------------


@dataclass
class NewWeights:
    """What the masks of a batch have now: places among all of B mn, and values, with room for the most there may be;
    ``counts`` are on the device where they are not known."""

    matrices: Sequence[Masked]
    places: Tensor
    values: dict[str, Tensor]
    counts: list[int] | Tensor

    def hand_over(self, counts: Sequence[int]) -> Iterator[tuple[Masked, Change]]:
        """To the state of parameters; of experts, their places are told."""
        total, begins = sum(counts), [-i * self.matrices[0].size for i in range(len(counts))]
        indices = torch._foreach_add(list(torch.split(self.places[:total], list(counts))), begins)
        new, held = [], []
        for key, values in self.values.items():
            for matrix, own in zip(self.matrices, torch.split(values[:total], list(counts)), strict=True):
                matrix.state[key] = torch.empty_like(own)  # each in memory of its own
                new.append(matrix.state[key])
                held.append(own)
        if new:
            torch._foreach_copy_(new, held)
        for matrix, own in zip(self.matrices, indices, strict=True):
            if matrix.expert is None:
                matrix.state["indices"] = own
            yield matrix, Change(own, own)


def taken(batch: Alike, kept: Tensor, there: Tensor, counts: list[int] | Tensor, most: int) -> NewWeights:
    """Weights and values as in ``optimizer._take``, of all matrices of a batch; ``most`` is what they have at most."""
    places = places_of(there.view(-1), most)
    values: dict[str, Tensor] = {}
    if batch.matrices[0].expert is None:
        stays = batch.there & there
        if batch.group["reinit_when_same"]:
            stays &= kept
        gone = stays.logical_not_()
        W = batch.weights
        if not is_frozen_outside(batch.group):
            W = W.masked_fill_(gone, 0)
            torch._foreach_copy_([matrix.weights for matrix in batch.matrices], list(W.unbind()))
        at = places.clamp(max=gone.numel() - 1)
        new = gone.view(-1).index_select(0, at)
        place = torch.searchsorted(batch.places, at).clamp_(max=len(batch.places) - 1)
        firsts = {**dict.fromkeys(MOMENTS, 0), BORN: batch.matrices[0].clock}
        names = [key for key in firsts if key in batch.matrices[0].state]
        for same in ([key for key in names if key != BORN], [key for key in names if key == BORN]):
            if same:
                held = torch.cat([matrix.state[key] for key in same for matrix in batch.matrices]).view(len(same), -1)
                values |= zip(same, held.index_select(1, place).masked_fill_(new, firsts[same[0]]), strict=True)
        if START in batch.matrices[0].state:
            starts = torch.cat([matrix.state[START] for matrix in batch.matrices]).index_select(0, place)
            values[START] = torch.where(new, W.view(-1).index_select(0, at).to(starts.dtype), starts)
    return NewWeights(batch.matrices, places, values, counts)


def handed_over(waiting: Sequence[NewWeights]) -> list[tuple[Masked, Change]]:
    """``hand_over`` of each. The device is asked once, if at all."""
    asked = [new.counts for new in waiting if isinstance(new.counts, Tensor)]
    told = iter(torch.cat(asked).tolist() if asked else [])
    found: list[tuple[Masked, Change]] = []
    for new in waiting:
        known = new.counts if isinstance(new.counts, list) else [int(next(told)) for _ in new.matrices]
        found += new.hand_over(known)
    return found
