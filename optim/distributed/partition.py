"""How an engine will cut parameters, before there are any processes: for shapes and bytes alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from .layout import ParamRef
from .process_group import FakeGroup
from .sliced import ShardRange

Cut = Callable[[Sequence[ParamRef], int, int], list[tuple[ParamRef, ShardRange]]]


def _even(count: int, parts: int) -> tuple[int, ...]:
    """The bounds of equal parts, the last ones short or empty."""
    share = -(-count // parts)
    return tuple(min(i * share, count) for i in range(parts + 1))


def as_one(members: Sequence[ParamRef], rank: int, size: int) -> list[tuple[ParamRef, ShardRange]]:
    """DeepSpeed ZeRO 1 and 2: a group's parameters end to end in one buffer, cut into equal parts."""
    lengths = [math.prod(member.shape) for member in members]
    part = flat_length(as_one, [member.shape for member in members], size)
    found = []
    for member, length, end in zip(members, lengths, itertools.accumulate(lengths), strict=True):
        begin = end - length
        bounds = tuple(min(max(i * part - begin, 0), length) for i in range(size + 1))
        found.append((member, ShardRange(member.shape, bounds, 0, FakeGroup(rank, size))))
    return found


def each(members: Sequence[ParamRef], rank: int, size: int) -> list[tuple[ParamRef, ShardRange]]:
    """DeepSpeed ZeRO 3: every parameter is cut by itself, without regard to its rows."""
    world = FakeGroup(rank, size)
    return [(member, ShardRange(member.shape, _even(math.prod(member.shape), size), 0, world)) for member in members]


def by_rows(members: Sequence[ParamRef], rank: int, size: int) -> list[tuple[ParamRef, ShardRange]]:
    """FSDP2: every parameter is cut between its rows."""
    world = FakeGroup(rank, size)
    found = []
    for member in members:
        row = math.prod(member.shape[1:])
        bounds = tuple(row * bound for bound in _even(member.shape[0], size))
        found.append((member, ShardRange(member.shape, bounds, 0, world, chunked=True)))
    return found


def flat_length(cut: Cut, shapes: Sequence[tuple[int, ...]], size: int) -> int:
    """Elements, padding included, of the flat tensor that ZeRO makes of a group's parts on each process."""
    lengths = [math.prod(shape) for shape in shapes]
    if cut is each:
        return sum(-(-length // size) for length in lengths)
    return -(-sum(lengths) // (2 * size)) * 2  # parts are aligned to two elements
