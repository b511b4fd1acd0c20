"""How an engine will cut parameters, before there are any processes: for shapes and bytes alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from .layout import ParamRef
from .process_group import FakeGroup
from .shard_range import ShardRange

Cut = Callable[[Sequence[ParamRef], int, int], list[tuple[ParamRef, ShardRange]]]


def _even(count: int, parts: int) -> tuple[int, ...]:
    """The bounds of equal parts, the last ones short or empty."""
    share = -(-count // parts)
    return tuple(min(i * share, count) for i in range(parts + 1))


def as_one_buffer(refs: Sequence[ParamRef], index: int, size: int) -> list[tuple[ParamRef, ShardRange]]:
    """DeepSpeed ZeRO 1 and 2: a group's parameters end to end in one buffer, cut into equal parts."""
    lengths = [math.prod(ref.shape) for ref in refs]
    part = flat_length(as_one_buffer, [ref.shape for ref in refs], size)
    found = []
    for ref, length, end in zip(refs, lengths, itertools.accumulate(lengths), strict=True):
        begin = end - length
        bounds = tuple(min(max(i * part - begin, 0), length) for i in range(size + 1))
        found.append((ref, ShardRange(ref.shape, bounds, 0, FakeGroup(index, size))))
    return found


def each_alone(refs: Sequence[ParamRef], index: int, size: int) -> list[tuple[ParamRef, ShardRange]]:
    """DeepSpeed ZeRO 3: every parameter is cut by itself, without regard to its rows."""
    processes = FakeGroup(index, size)
    return [(ref, ShardRange(ref.shape, _even(math.prod(ref.shape), size), 0, processes)) for ref in refs]


def by_rows(refs: Sequence[ParamRef], index: int, size: int) -> list[tuple[ParamRef, ShardRange]]:
    """FSDP2: every parameter is cut between its rows."""
    processes = FakeGroup(index, size)
    found = []
    for ref in refs:
        row = math.prod(ref.shape[1:])
        bounds = tuple(row * bound for bound in _even(ref.shape[0], size))
        found.append((ref, ShardRange(ref.shape, bounds, 0, processes, chunked=True)))
    return found


def flat_length(cut: Cut, shapes: Sequence[tuple[int, ...]], size: int) -> int:
    """Elements, padding included, of the flat tensor that ZeRO makes of a group's parts on each process."""
    lengths = [math.prod(shape) for shape in shapes]
    if cut is each_alone:
        return sum(-(-length // size) for length in lengths)
    return -(-sum(lengths) // (2 * size)) * 2  # parts are aligned to two elements
