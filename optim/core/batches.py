"""Parameters that are moved together: on a GPU a launch costs as much as the arithmetic of a small matrix.

A method says once where one parameter goes, as a generator: it yields coordinates, gets what the rule makes of them,
and returns the update. Alone, the rule is asked for one. In a batch all are begun, the rule is asked once for all, and
each is ended. On a CPU, where launches cost next to nothing, each is alone, on the bits of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torch import Tensor

from ..distributed import FullShard, Update, has_subspace
from .clock import steps_of
from .rules import Rule
from .types import Group, ParamStep, State

AT_ONCE = 2**24  # coordinates of a batch: 64 MiB in fp32, and as much for what the rule makes of them

Found = tuple[Tensor, float]  # the direction of coordinates, and the factor on the learning rate
Towards = tuple[Update, float]  # the same of a parameter
Direction = Generator[tuple[Tensor, State], Found, Towards]


def found_alone(direction: Direction, rule: Rule, group: Group) -> Towards:
    """What a direction comes to, by a call of the rule of its own."""
    try:
        coordinates, state = next(direction)
    except StopIteration as end:  # a rule of its own
        towards: Towards = end.value
        return towards
    return _ended(direction, rule.direction(coordinates, state, group))


def found_together(directions: Sequence[Direction], rule: Rule, group: Group) -> Iterator[Towards]:
    """What directions come to, one after the other, by one call of the rule."""
    assert rule.together is not None
    coordinates, states = zip(*map(next, directions), strict=True)
    moved, correction = rule.together(coordinates, states, group)
    del coordinates
    for direction, own in zip(directions, moved, strict=True):
        yield _ended(direction, (own, correction))


def _ended(direction: Direction, found: Found) -> Towards:
    try:
        direction.send(found)
    except StopIteration as end:
        towards: Towards = end.value
        return towards
    raise RuntimeError("a direction asks the rule once")


def launches_cost(device: torch.device) -> bool:
    """Whether to launch a kernel takes as long as to run it on a small matrix."""
    return device.type != "cpu"


def batches(portion: Sequence[ParamStep], may: Callable[[ParamStep], bool]) -> Iterator[list[ParamStep]]:
    """The parameters of a portion, those together that ``may`` be and are alike in group, clock, dtype and device, on
    every process in the same order."""
    waiting: dict[tuple[object, ...], list[ParamStep]] = {}
    for item in portion:
        if not (launches_cost(item.shard.device) and may(item)):
            yield [item]
            continue
        held = [state.dtype for key, state in item.state.items() if key != "step"]
        kind = id(item.group), steps_of(item.state), item.shard.device, item.shard.dtype, *held
        batch = waiting.setdefault(kind, [])
        if batch and sum(coordinates_of(other.shard) for other in [*batch, item]) > AT_ONCE:
            yield waiting.pop(kind)
            batch = waiting.setdefault(kind, [])
        batch.append(item)
    yield from waiting.values()


def coordinates_of(shard: FullShard) -> int:
    """How many coordinates all of a parameter has: what a process holds of them may differ."""
    return math.prod(shard.side.projected_shape if has_subspace(shard) else shard.shape)


def write_together(shards: Sequence[FullShard], towards: Iterator[Towards], group: Group, decay_first: bool) -> None:
    """``FullShard.write`` of each, in the same order on every process."""
    weights = [shard.parameter for shard in shards]
    decay = group["lr"] * group["weight_decay"]
    if decay and decay_first:
        torch._foreach_mul_(weights, 1 - decay)
    dense: list[tuple[Tensor, Tensor]] = []
    for shard, (update, correction) in zip(shards, towards, strict=True):
        step = -group["lr"] * correction
        if isinstance(update, Tensor) and not has_subspace(shard):
            dense.append((shard.parameter, update))
        else:
            shard.add_(update, step)
    if dense:
        torch._foreach_add_([W for W, _ in dense], [own for _, own in dense], alpha=step)
    if decay and not decay_first:
        torch._foreach_mul_(weights, 1 - decay)
