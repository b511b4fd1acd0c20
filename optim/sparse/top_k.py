"""The k largest of many numbers that several processes hold, exactly: as many as asked for, ties to the lowest index.

Numbers are compared by their keys, whole numbers in the same order. The k-th largest key is found digit by digit from
the highest on, by one histogram a digit:

    H  <-  how many candidates have each value of the digit          summed over processes
    d  <-  the digit of the k-th largest: sure are those above it, candidates those that have it

Each round sums the counts of all matrices in one message of a few thousand, whatever their size; a last one says how
many processes before this one hold of the ties. Slices are ranges of indices in the order of processes, so that the
choice is the same however a matrix is split. All keys are looked at twice, some at a time, and never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ...rng import generator_of
from ..core.batches import launches_cost
from ..distributed import FullShard, all_reduce_shares_, spans

AT_ONCE = 2**20  # keys looked at together: they stay in a CPU's cache
ON_A_GPU = 2**24  # where each look costs launches
FIRST, NEXT = 11, 10  # bits of the first digit, an fp32's exponent and three of its mantissa, and of the others
LARGEST = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}  # keys
LAST = LARGEST[torch.int64]


class Choice(NamedTuple):
    """Candidates of which some are to be chosen: ``keys(begin, end)`` gives the keys of this process's from ``begin``
    to ``end`` of ``size`` (int32, or int64 for doubles); those below zero are out."""

    shard: FullShard
    size: int
    keys: Callable[[int, int], Tensor]


def keys_at_once(device: torch.device) -> int:
    """How many keys are looked at together."""
    return ON_A_GPU if launches_cost(device) else AT_ONCE


def keys_of(values: Tensor) -> Tensor:
    """Whole numbers in the order of the absolute values: their bits without the sign."""
    if values.dtype == torch.float64:
        wide: Tensor = values.view(torch.int64) & LARGEST[torch.int64]
        return wide
    keys: Tensor = values.float().view(torch.int32) & LARGEST[torch.int32]
    return keys


def random_keys(positions: Tensor, *purpose: object) -> Tensor:
    """A random number (int32, >= 0) for each position (int64), a function of it and of ``purpose`` alone: the same on
    every process, however a matrix is split. Ranking by them draws without replacement."""
    salt, factor = salt_of(*purpose)
    return mixed(positions, salt, factor)


def salt_of(*purpose: object) -> tuple[int, int]:
    """The salt and the factor of random keys."""
    salt, step = torch.randint(2**32, (2,), generator=generator_of(*purpose), device="cpu").tolist()
    return salt, step | 1


def mixed(positions: Tensor, salt: int | Tensor, factor: int | Tensor) -> Tensor:
    """The random keys of positions (int32, >= 0)."""
    x = (positions * factor + salt) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # murmur3's finalizer mixes every bit into every bit
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    keys: Tensor = ((x ^ (x >> 16)) >> 1).int()
    return keys


def largest_of_each(choices: Sequence[Choice], counts: Sequence[int]) -> list[Tensor]:
    """For each choice the ascending places (int64) of this process's among the ``count`` largest over all processes.

    Fewer where there are not as many candidates. Collective.
    """
    sorted_here = [_is_sorted(choice) for choice in choices]
    both = list(zip(choices, counts, sorted_here, strict=True))
    ranked = iter(_by_sorting([(choice, count) for choice, count, here in both if here]))
    others = [(choice, count) for choice, count, here in both if not here]
    found = iter(_largest([[choice] for choice, _ in others], [count for _, count in others]))
    return [next(ranked if here else found) for here in sorted_here]


def largest_of_all(choices: Sequence[Choice], count: int) -> list[Tensor]:
    """``largest_of_each`` with one count for all choices together; ties to the first choice, then to the lowest."""
    return _largest([list(choices)], [count])


def _is_sorted(choice: Choice) -> bool:
    """Whether a choice is made by sorting keys, in a few launches and no stop of the device, and not digit by digit."""
    device = choice.shard.device
    whole = not choice.shard.split and 0 < choice.size <= ON_A_GPU
    return whole and launches_cost(device) and choice.keys(0, 0).dtype == torch.int32


def _by_sorting(wanted: Sequence[tuple[Choice, int]]) -> list[Tensor]:
    """``largest_of_each`` of whole matrices. Keys with their places below them are all different: ties go to the lowest
    place, and the order is one on every device."""
    best, held = [], []
    for choice, count in wanted:
        order = choice.keys(0, choice.size).long().bitwise_left_shift_(32)
        order.add_(torch.arange(choice.size - 1, -1, -1, device=order.device))
        largest = torch.topk(order, min(count, choice.size)).values
        held.append((largest >= 0).sum())  # below: out
        best.append(largest.bitwise_and_(0xFFFFFFFF).neg_().add_(choice.size - 1))
    if not held:
        return []
    counts = torch.stack(held).tolist()  # one stop of the device for all
    return [places[:count].sort().values for places, count in zip(best, counts, strict=True)]


class _Sought:
    """One choice on its way: ``sure`` are chosen, of the candidates at ``places`` the ``keys`` are left to compare."""

    def __init__(self, choice: Choice, pool: int) -> None:
        self.choice, self.pool = choice, pool
        self.places: Tensor | None = None  # None: all of them
        self.keys = choice.keys(0, 0)
        self.sure: list[Tensor] = []

    def histogram(self, digit: _Digit) -> Tensor:
        if self.places is not None:
            return torch.bincount(digit.of(self.keys), minlength=digit.values)
        counted = torch.zeros(digit.values + 1, dtype=torch.int64, device=self.choice.shard.parameter.device)
        for part in spans(self.choice.size, keys_at_once(self.choice.shard.device)):
            keys = self.choice.keys(part.start, part.stop)
            counted += torch.bincount((keys >> digit.shift) + 1, minlength=digit.values + 1)  # -1: out
        return counted[1:]

    def narrow(self, digit: _Digit, value: int) -> None:
        """Those whose digit is larger are chosen; those with the same stay candidates."""
        if self.places is not None:
            own = digit.of(self.keys)
            self.sure.append(self.places[own > value])
            self.places, self.keys = self.places[own == value], self.keys[own == value]
            return
        places, held = [], []
        for part in spans(self.choice.size, keys_at_once(self.choice.shard.device)):
            keys = self.choice.keys(part.start, part.stop)
            at = (keys >= value << digit.shift).nonzero().view(-1)
            places.append(at + part.start)
            held.append(keys[at])
        self.places, self.keys = _joined(places, self.choice), _joined(held, self.choice)
        self.narrow(digit, value)

    def chosen(self, ties: int) -> Tensor:
        assert self.places is not None
        return torch.cat([*self.sure, self.places[:ties]]).sort().values


class _Digit(NamedTuple):
    shift: int
    values: int

    def of(self, keys: Tensor) -> Tensor:
        return (keys >> self.shift) & (self.values - 1)


def _digits(dtype: torch.dtype) -> list[_Digit]:
    shift = (31 if dtype == torch.int32 else 63) - FIRST
    digits = [_Digit(shift, 2**FIRST)]
    while shift:
        bits = min(NEXT, shift)
        shift -= bits
        digits.append(_Digit(shift, 2**bits))
    return digits


def _largest(pools: Sequence[Sequence[Choice]], counts: Sequence[int]) -> list[Tensor]:
    sought = [_Sought(choice, number) for number, pool in enumerate(pools) for choice in pool]
    if not sought:
        return []
    kind = sought[0].choice.keys(0, 0).dtype
    wanted = list(counts)
    for digit in _digits(kind):
        counted = [one.histogram(digit) for one in sought]
        all_reduce_shares_([(one.choice.shard, part) for one, part in zip(sought, counted, strict=True)])
        for number, (value, missing) in enumerate(_boundaries(sought, counted, wanted)):
            wanted[number] = missing
            for one in sought:
                if one.pool == number:
                    one.narrow(digit, value)
    return [one.chosen(ties) for one, ties in zip(sought, _ties(sought, wanted), strict=True)]


def _boundaries(sought: Sequence[_Sought], counted: Sequence[Tensor], wanted: Sequence[int]) -> list[tuple[int, int]]:
    """For each pool the digit of its last chosen one, and how many of those that have it are still to be found."""
    tails = []
    for number in range(len(wanted)):
        pool = torch.stack([part for one, part in zip(sought, counted, strict=True) if one.pool == number]).sum(0)
        at_least = pool.flip(0).cumsum(0).flip(0)  # how many have this value or a larger one
        tails.append(torch.cat([at_least, at_least.new_zeros(1)]))
    wants = torch.tensor(wanted, dtype=torch.int64, device=tails[0].device)
    at_least = torch.stack([tail.to(wants.device) for tail in tails])
    wants = torch.minimum(wants, at_least[:, 0])
    values = ((at_least[:, :-1] >= wants[:, None]).sum(1) - 1).clamp(min=0)
    missing = wants - at_least.gather(1, values[:, None] + 1).view(-1)
    return list(zip(values.tolist(), missing.tolist(), strict=True))  # one stop of the device for all


def _ties(sought: Sequence[_Sought], wanted: Sequence[int]) -> list[int]:
    """How many of its last candidates, which are all alike, this process's part of each choice takes."""
    held, before = [], []
    for one in sought:
        processes, places = one.choice.shard.processes, one.places
        assert places is not None
        of_each = torch.zeros(processes.size if one.choice.shard.split else 1, dtype=torch.int64, device=places.device)
        of_each[processes.index if one.choice.shard.split else 0] = len(places)
        held.append(of_each)
        before.append(processes.index if one.choice.shard.split else 0)
    all_reduce_shares_([(one.choice.shard, part) for one, part in zip(sought, held, strict=True)])
    left, taken = list(wanted), []
    for one, of_each, index in zip(sought, held, before, strict=True):
        ends = list(accumulate(of_each.tolist(), initial=0))
        taken.append(max(0, min(left[one.pool], ends[index + 1]) - ends[index]))
        left[one.pool] -= min(left[one.pool], ends[-1])
    return taken


def _joined(parts: list[Tensor], choice: Choice) -> Tensor:
    return torch.cat(parts) if parts else choice.keys(0, 0)


# ---- of many rows at once, where nothing is read back ----------------------------------------------------------------


def ranked(keys: Tensor, last_first: Tensor, bits: int = 32) -> Tensor:
    """An order without ties of ``keys`` (R x n), the lowest place first among equals; what is out is below zero.
    ``last_first`` are the places from the last on, in less than ``bits``."""
    order: Tensor = keys.long().bitwise_left_shift_(bits).add_(last_first)
    return order


def first_of(order: Tensor, counts: Sequence[int], on_device: Tensor) -> Tensor:
    """Which (bool) of ``order`` (R x n) are the ``counts`` (R, and R x 1 on the device) first of their row."""
    most = min(max(counts, default=0), order.shape[1])
    if most <= 0:
        return torch.zeros_like(order, dtype=torch.bool)
    best = torch.topk(order, most).values
    last = best[:, -1:] if min(counts) == max(counts) else _at(best, on_device)
    return order >= last


def first_of_rows(order: Tensor, counts: Tensor) -> Tensor:
    """``first_of`` where only the device knows the ``counts`` (R x 1)."""
    return order >= _at(order.sort(descending=True).values, counts)


def _at(best: Tensor, counts: Tensor) -> Tensor:
    return best.gather(1, (counts - 1).clamp_(min=0)).masked_fill_(counts <= 0, LAST)


def places_of(there: Tensor, count: int) -> Tensor:
    """The first ``count`` places (int32, ascending) of a flat mask, how many it has not being asked; past the last one
    where it has fewer."""
    ends = there.cumsum(0, dtype=torch.int32)
    return torch.searchsorted(ends, torch.arange(1, count + 1, dtype=torch.int32, device=there.device), out_int32=True)
