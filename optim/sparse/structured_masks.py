"""Masks whose weights are kept or left together: rows with as many weights each, and blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...fp64 import widest
from ...validation import number, whole
from ..distributed import FlatShard, RowView, all_reduce_shares_, spans
from .masks import Change, Keys, Masked, Structure, all_of, chosen_of_masks, first_keys_of, kept_of, without
from .top_k import LARGEST, keys_at_once, keys_of, largest_of_each


class ConstantFanIn(Structure):
    """As many weights in each row (SRigL: Lasby et al. 2024, arXiv:2305.02299), but none in rows that are ablated.

    A row is ablated where too few of its weights are salient, among those that an unstructured update would keep or
    those with the largest gradients: fewer than ``gamma_sal`` of the fan-in, or than ``gamma_sal`` itself from 1 on. It
    is decided anew at each update. The authors' code keeps any of a row's weights where they are more than the fan-in,
    for it sorts their being there; here the largest stay, as in the paper.
    """

    def check(self, group: dict[str, Any]) -> None:
        number(">= 0")("gamma_sal", group["gamma_sal"])

    def check_budget(self, units: int, shape: tuple[int, int]) -> None:
        if units < shape[0]:
            raise ValueError(
                f"sparsity leaves {units} weights to the {shape[0]} rows of a matrix of shape {shape}, less than one "
                "each; choose a lower sparsity, or an unstructured mask"
            )

    def amounts(self, held: int, budget: int, fraction: float) -> tuple[int, int]:
        dropped = math.floor(fraction * held)
        return held - dropped, dropped

    def begin(self, matrices: Sequence[Masked], budgets: Sequence[int], held: Sequence[int]) -> list[Tensor]:
        return [_first_rows(*item) for item in zip(matrices, budgets, held, strict=True)]

    def change(
        self, matrices: Sequence[Masked], budgets: Sequence[int], keep: Sequence[int], grow: Sequence[int]
    ) -> list[Change]:
        kept = kept_of(matrices, keep)
        active = _active(matrices, kept, grow, budgets)
        left = torch.stack([rows.sum() for rows in active]).tolist() if active else []
        ablating = [i for i, matrix in enumerate(matrices) if matrix.group["gamma_sal"] > 0]
        keys = [_keys_in(matrices[i], active[i]) for i in ablating]
        again = chosen_of_masks([matrices[i] for i in ablating], keys, [keep[i] for i in ablating])
        for i, own in zip(ablating, again, strict=True):  # rows that stay keep what ablated ones had
            kept[i] = own
        return [
            _filled(matrix, own, rows, budget // count)
            for matrix, own, rows, budget, count in zip(matrices, kept, active, budgets, left, strict=True)
        ]


class Blocks(Structure):
    """Blocks of b x b weights, each worth the norm of what is in it (BLaST: Okanovic et al. 2025, arXiv:2507.03117)."""

    def check(self, group: dict[str, Any]) -> None:
        whole(1)("block_size", group["block_size"])

    def check_shape(self, shape: tuple[int, int], group: dict[str, Any]) -> None:
        size = group["block_size"]
        if any(side % size for side in shape):
            raise ValueError(
                f"block_size={size} does not divide both sides of a matrix of shape {shape}; choose one that does, or "
                "put the matrix into a group without a sparsity"
            )

    def units(self, shape: tuple[int, int], group: dict[str, Any]) -> int:
        return shape[0] * shape[1] // int(group["block_size"]) ** 2

    def weights(self, units: int, group: dict[str, Any]) -> int:
        return units * int(group["block_size"]) ** 2

    def begin(self, matrices: Sequence[Masked], budgets: Sequence[int], held: Sequence[int]) -> list[Tensor]:
        worth = [_Blocked(matrix).sums(matrix.weights) for matrix in matrices]
        all_reduce_shares_([(matrix.shard, sums) for matrix, sums in zip(matrices, worth, strict=True)])
        found = []
        for matrix, sums, count in zip(matrices, worth, budgets, strict=True):
            keys = _keys_of_sums(sums)
            if matrix.group["init"] == "random":
                drawn = _random_blocks(matrix, "first")
                is_sparse = int((keys > 0).sum()) <= count
                most = LARGEST[torch.int32]
                keys = drawn.clamp_(max=most - 1).masked_fill_(keys > 0, most) if is_sparse else drawn
            found.append(_Blocked(matrix).places_of(_largest_here(keys, count)))
        return found

    def change(
        self, matrices: Sequence[Masked], budgets: Sequence[int], keep: Sequence[int], grow: Sequence[int]
    ) -> list[Change]:
        sums = [_sums_of_blocks(matrix) for matrix in matrices]
        all_reduce_shares_([(matrix.shard, part) for matrix, part in zip(matrices, sums, strict=True)])
        items = zip(matrices, sums, keep, grow, strict=True)
        return [_changed_blocks(matrix, own, kept, grown) for matrix, own, kept, grown in items]


# ---- rows ------------------------------------------------------------------------------------------------------------


class _Rows:
    """The rows of a matrix that this process touches. A row that is cut is worked on by all that hold a part of it."""

    def __init__(self, matrix: Masked) -> None:
        self.matrix, shard = matrix, matrix.shard
        self.first, self.last = 0, matrix.shape[0]
        self.split: RowView | None = None
        if isinstance(shard, FlatShard):
            self.split = RowView(shard.held, matrix.shape[1])
            self.first, self.last = self.split.touched

    def of(self, *flats: Tensor) -> list[Tensor]:
        """Tensors that are laid out as the weights, in whole rows (rows x n). Collective where a row is cut."""
        if self.split is not None:
            return self.split.gather_rows(*flats)
        return [flat.view(self.matrix.shape) for flat in flats]

    def own(self, by_row: Tensor) -> Tensor:
        """Of what there is one for each row of the whole matrix."""
        return by_row[self.first : self.last]

    def flat(self, keys: Keys) -> Tensor:
        """The keys of all of this process's weights."""
        found = torch.empty(self.matrix.size, dtype=self.matrix.key_dtype, device=self.matrix.device)
        for part in spans(self.matrix.size, keys_at_once(found.device)):
            found[part] = keys(part.start, part.stop)
        return found

    def counts(self, places: Tensor) -> Tensor:
        """How many of ``places`` lie in each row (m): this process's share."""
        m, n = self.matrix.shape
        return torch.bincount((places.long() + self.matrix.begin) // n, minlength=m)

    def places(self, chosen: Callable[[int, int], Tensor]) -> Tensor:
        """The ascending places (int32) of this process's weights that are ``chosen`` (bool) among the rows from one to
        another."""
        n = self.matrix.shape[1]
        found = [torch.empty(0, dtype=torch.int64, device=self.matrix.device)]
        at_once = max(1, keys_at_once(self.matrix.device) // n)
        for begin in range(0, self.last - self.first, at_once):
            rows = chosen(begin, min(begin + at_once, self.last - self.first))
            places = rows.reshape(-1).nonzero().view(-1) + ((self.first + begin) * n - self.matrix.begin)
            found.append(places[(places >= 0) & (places < self.matrix.size)])
        return torch.cat(found).int()


def _largest_of_rows(keys: Tensor, counts: Tensor) -> Tensor:
    """Which (bool) of ``keys`` (rows x n) are among the ``counts`` (rows) largest of their row; ties to the lowest
    column; those below zero are out."""
    most = int(counts.max()) if len(counts) else 0
    if most <= 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    kth = keys.topk(most, dim=1).values.gather(1, (counts[:, None] - 1).clamp(min=0)).clamp_(min=0)
    kth.masked_fill_(counts[:, None] <= 0, LARGEST[keys.dtype])
    sure, ties = keys > kth, keys == kth
    missing = counts - sure.sum(1)
    if bool((ties.sum(1) > missing).any()):
        ties &= ties.cumsum(1) <= missing[:, None]
    return sure | ties


def _first_rows(matrix: Masked, count: int, held: int) -> Tensor:
    rows = _Rows(matrix)
    (keys,) = rows.of(rows.flat(first_keys_of(matrix, held <= count)))
    active = torch.ones(matrix.shape[0], dtype=torch.int64, device=keys.device)
    if 0 < held <= count and matrix.group["gamma_sal"] > 0:  # it was trained so, and may have rows that are ablated
        active = rows.counts(matrix.weights.nonzero().view(-1))
        all_reduce_shares_([(matrix.shard, active)])
        active.clamp_(max=1)
        if int(active.sum()) * matrix.shape[1] < count:  # no: a row cannot have that many weights
            active.fill_(1)
    fan_in = rows.own(active) * (count // int(active.sum()))
    return rows.places(lambda a, b: _largest_of_rows(keys[a:b], fan_in[a:b]))


def _active(
    matrices: Sequence[Masked], kept: list[Tensor], grow: Sequence[int], budgets: Sequence[int]
) -> list[Tensor]:
    """Which rows (m, bool) of each matrix are not ablated."""
    chosen = largest_of_each([all_of(matrix, matrix.grow_keys) for matrix in matrices], grow)
    salient = [
        _Rows(matrix).counts(torch.unique(torch.cat([own.long(), new])))
        for matrix, own, new in zip(matrices, kept, chosen, strict=True)
    ]
    all_reduce_shares_([(matrix.shard, count) for matrix, count in zip(matrices, salient, strict=True)])
    items = zip(matrices, salient, budgets, strict=True)
    return [_salient_enough(matrix, count, budget) for matrix, count, budget in items]


def _salient_enough(matrix: Masked, salient: Tensor, budget: int) -> Tensor:
    least, place = least_salient(matrix, budget)
    # so many rows stay that none of them needs more weights than there are columns
    last = salient.sort(descending=True).values[place]
    return salient >= last.clamp(max=least)


def least_salient(matrix: Masked, budget: int) -> tuple[int, int]:
    """How many salient weights keep a row, and the place, from the row with most on, of one that stays in any case."""
    (m, n), gamma = matrix.shape, matrix.group["gamma_sal"]
    least = math.ceil(gamma) if gamma >= 1 else max(1, math.floor(gamma * (budget // m))) if gamma > 0 else 0
    return least, min(budget // n, m - 1)


def _keys_in(matrix: Masked, active: Tensor) -> Keys:
    """Keys of a mask's weights; those in ablated rows are out."""

    def keys(begin: int, end: int) -> Tensor:
        at = matrix.indices[begin:end]
        row = (at.long() + matrix.begin) // matrix.shape[1]
        return matrix.drop_keys(at).masked_fill_(~active[row], -1)

    return keys


def _filled(matrix: Masked, kept: Tensor, active: Tensor, fan_in: int) -> Change:
    """Each row that is not ablated keeps its ``fan_in`` largest, and grows what it lacks."""
    rows = _Rows(matrix)
    own = torch.full((matrix.size,), -1, dtype=matrix.key_dtype, device=kept.device)
    own.index_copy_(0, kept.long(), matrix.drop_keys(kept))
    held, free = rows.of(own, rows.flat(without(matrix.grow_keys, kept, matrix.size)))
    wanted = rows.own(active) * fan_in

    def retained(a: int, b: int) -> Tensor:
        return _largest_of_rows(held[a:b], torch.minimum(wanted[a:b], (held[a:b] >= 0).sum(1)))

    def filled(a: int, b: int) -> Tensor:
        stay = retained(a, b)
        return stay | _largest_of_rows(free[a:b], wanted[a:b] - stay.sum(1))

    return Change(rows.places(retained), rows.places(filled))


# ---- blocks ----------------------------------------------------------------------------------------------------------


class _Blocked(_Rows):
    """A matrix as blocks, numbered row by row; every process knows something of each, and all of it together."""

    def __init__(self, matrix: Masked) -> None:
        super().__init__(matrix)
        self.side = int(matrix.group["block_size"])
        self.down, self.across = (size // self.side for size in matrix.shape)

    def sums(self, flat: Tensor) -> Tensor:
        """The sums of squares (fp64) of a tensor that is laid out as the weights, over each block: this process's
        share."""
        n = self.matrix.shape[1]
        lead = max(0, self.matrix.begin - self.first * n)  # below zero where this process holds nothing
        tail = (self.last - self.first) * n - lead - len(flat)
        rows = torch.cat([flat.new_zeros(lead), flat, flat.new_zeros(tail)]) if lead or tail else flat
        rows, wide = rows.view(-1, n), widest(flat.device)
        sums = torch.zeros(self.down, self.across, dtype=wide, device=flat.device)
        number = torch.arange(self.first, self.last, device=flat.device) // self.side
        at_once = max(1, keys_at_once(self.matrix.device) // n)
        for begin in range(0, len(rows), at_once):
            part = rows[begin : begin + at_once].to(wide).square().view(-1, self.across, self.side).sum(2)
            sums.index_add_(0, number[begin : begin + at_once], part)
        return sums.view(-1)

    def sums_at(self, places: Tensor, values: Tensor) -> Tensor:
        """``sums`` of what is zero but at ``places``."""
        return self.sums(values.new_zeros(self.matrix.size).index_copy_(0, places.long(), values))

    def places_of(self, blocks: Tensor) -> Tensor:
        """The ascending places (int32) of this process's weights in ``blocks``."""
        there = torch.zeros(self.down * self.across, dtype=torch.bool, device=blocks.device)
        there[blocks] = True
        by_row = there.view(self.down, self.across).repeat_interleave(self.side, dim=1)
        number = torch.arange(self.first, self.last, device=blocks.device) // self.side
        return self.places(lambda a, b: by_row[number[a:b]])


def _sums_of_blocks(matrix: Masked) -> Tensor:
    """What each block has of the mask, what its weights are worth and what it promises (3 x blocks, fp64): this
    process's share."""
    blocked, at = _Blocked(matrix), matrix.indices
    worth, promise = matrix.drop_scores(at), matrix.grow_scores(0, matrix.size)
    there = blocked.sums_at(at, torch.ones(len(at), device=at.device))
    nothing = torch.zeros_like(there)
    return torch.stack(
        [
            there,
            nothing if worth is None else blocked.sums_at(at, worth),
            nothing if promise is None else blocked.sums(promise),
        ]
    )


def _changed_blocks(matrix: Masked, sums: Tensor, keep: int, grow: int) -> Change:
    there, worth, promise = sums
    by_chance = {key: matrix.group[key] == "random" for key in ("drop", "grow")}
    worth = _random_blocks(matrix, "drop", matrix.clock) if by_chance["drop"] else _keys_of_sums(worth)
    promise = _random_blocks(matrix, "grow", matrix.clock) if by_chance["grow"] else _keys_of_sums(promise)
    kept = _largest_here(worth.masked_fill(there == 0, -1), keep)
    grown = _largest_here(promise.index_fill(0, kept, -1), grow)
    blocked = _Blocked(matrix)
    return Change(blocked.places_of(kept), blocked.places_of(torch.cat([kept, grown])))


def _keys_of_sums(sums: Tensor) -> Tensor:
    """Rounded: sums over several processes differ in the last bits of fp64, and their choice must not."""
    return keys_of(sums.float())


def _random_blocks(matrix: Masked, *purpose: object) -> Tensor:
    blocked = _Blocked(matrix)
    units = torch.arange(blocked.down * blocked.across, device=matrix.device)
    return matrix.random(units, *purpose).int()


def _largest_here(keys: Tensor, count: int) -> Tensor:
    """The ``count`` largest of keys that every process has; ties to the lowest; those below zero are out."""
    chosen = keys.sort(descending=True, stable=True).indices[:count]
    return chosen[keys[chosen] >= 0].sort().values
