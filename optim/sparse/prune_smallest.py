"""The smallest of all weights of several tensors, as one vector, over all processes: their bound, and their removal.

Numbers are compared by their keys (``top_k.keys_of``). The n-th smallest is found digit by digit, by one
histogram of all weights a digit, summed over processes in one message; nothing of the weights' size is kept. Where
weights tie, those of the first tensor and the lowest index stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...fp64 import widest
from ..core import batches
from ..core.batches import launches_cost
from ..distributed import FullShard, all_reduce_shares_
from .experts import experts_of
from .frozen_zeros import keep_only_
from .top_k import AT_ONCE, keys_of

DIGIT = 11  # bits


def sum_over(shards: Sequence[FullShard], parts: Sequence[Tensor]) -> Tensor:
    """The sum over all tensors and processes, where each process has a part of each sum. Collective."""
    totals: dict[int | None, tuple[FullShard, Tensor]] = {}
    for shard, part in zip(shards, parts, strict=True):
        key = id(shard.processes.group) if shard.split else None
        if key in totals:
            totals[key][1].add_(part)
        else:
            totals[key] = (shard, part.clone())
    all_reduce_shares_(list(totals.values()))
    return torch.stack([total for _, total in totals.values()]).sum(0)


def summed_up(shards: Sequence[FullShard], counted: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``counted`` makes of flat weights, over all tensors and processes. On a GPU those of several whole tensors
    are counted together. Collective."""
    whole = [shard for shard in shards if not shard.split and launches_cost(shard.device)]
    alone = [shard for shard in shards if shard.split or not launches_cost(shard.device)]
    parts = [(shard, counted(own)) for shard in alone for own in _matrices(shard)]
    parts += [(whole[0], counted(own)) for own in _together(whole)]
    return sum_over([shard for shard, _ in parts], [part for _, part in parts])


def _matrices(shard: FullShard) -> list[Tensor]:
    """The weights of each matrix of a tensor, so that experts are summed as parameters of their own are."""
    held = [expert.shard.parameter for expert in experts_of(shard)] or [shard.parameter]
    return [own.detach().reshape(-1) for own in held]


def _together(shards: Sequence[FullShard]) -> Iterator[Tensor]:
    """Weights of several tensors one after the other, as many as a workspace has room for."""
    waiting: list[Tensor] = []
    for shard in shards:
        for own in torch.split(shard.parameter.detach().view(-1), batches.AT_ONCE):
            if waiting and (own.dtype != waiting[0].dtype or sum(map(len, waiting)) + len(own) > batches.AT_ONCE):
                yield torch.cat(waiting)
                waiting = []
            waiting.append(own)
    if waiting:
        yield torch.cat(waiting)


def nth_smallest(shards: Sequence[FullShard], n: Tensor) -> tuple[Tensor, Tensor]:
    """The key of the ``n``-th smallest absolute value, from 1 on, and how many weights with this key are among the
    ``n`` smallest; all int64 scalars. Collective."""
    wide = _wide(shards)
    shift = 63 if wide == torch.float64 else 31
    key, missing = torch.zeros_like(n), n
    while shift:
        width = min(DIGIT, shift)
        shift -= width
        counted = summed_up(shards, lambda W: _histogram(W, wide, key, shift, width)).cumsum(0)  # noqa: B023
        digit = (counted < missing).sum()
        missing = missing - torch.cat([counted.new_zeros(1), counted]).gather(0, digit.view(1)).view(())
        key = (key << width) + digit
    return key, missing


def value_of(key: Tensor, shards: Sequence[FullShard]) -> Tensor:
    """The absolute value that has ``key``, as fp64 where the device has it."""
    wide = _wide(shards)
    if wide == torch.float64:
        return key.view(torch.float64)
    return key.int().view(torch.float32).to(widest(key.device))


def prune_smallest_(shards: Sequence[FullShard], n: Tensor) -> None:
    """The ``n`` smallest weights become zero, exactly so many. Collective."""
    wide = _wide(shards)
    key, dropped = nth_smallest(shards, n)
    ties = []
    for shard in shards:
        of_each = torch.zeros(shard.processes.size if shard.split else 1, dtype=torch.int64, device=n.device)
        for _, keys in _keys_of(shard, wide):
            of_each[shard.processes.index if shard.split else 0] += (keys == key).sum()
        ties.append(of_each)
    all_reduce_shares_(list(zip(shards, ties, strict=True)))
    staying = torch.stack([of_each.sum() for of_each in ties]).sum() - dropped
    before = torch.zeros_like(n)
    for shard, of_each in zip(shards, ties, strict=True):
        order = before + (of_each[: shard.processes.index].sum() if shard.split else 0)
        for weights, keys in _keys_of(shard, wide):
            tie = keys == key
            keep_only_(weights, (keys > key) | (tie & (order + tie.cumsum(0) <= staying)))
            order = order + tie.sum()
        before = before + of_each.sum()


def _histogram(weights: Tensor, wide: torch.dtype, key: Tensor, shift: int, width: int) -> Tensor:
    """Of the weights whose keys begin with ``key``, how many have each value of the digit at ``shift``."""
    counts = torch.zeros(2**width + 1, dtype=torch.int64, device=key.device)
    for _, keys in _keys(weights, wide):
        digits = torch.where(keys >> (shift + width) == key, (keys >> shift) & (2**width - 1), 2**width)
        if launches_cost(key.device):  # bincount would stop the device; a sum of whole numbers is one in any order
            counts.scatter_add_(0, digits.long(), counts.new_ones(()).expand(len(digits)))
        else:
            counts += torch.bincount(digits, minlength=2**width + 1)
    return counts[:-1]


def _keys(weights: Tensor, wide: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat weights, some at a time, each time a view and their keys."""
    for own in torch.split(weights, batches.AT_ONCE if launches_cost(weights.device) else AT_ONCE):
        yield own, keys_of(own.to(wide))


def _keys_of(shard: FullShard, wide: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    return _keys(shard.parameter.detach().view(-1), wide)


def _wide(shards: Sequence[FullShard]) -> torch.dtype:
    double = any(shard.parameter.dtype == torch.float64 for shard in shards)
    return torch.float64 if double else torch.float32
