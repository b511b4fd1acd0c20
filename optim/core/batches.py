"""Parameters that are moved together: on a GPU a launch costs as much as the arithmetic of a small matrix.

A method says once where one parameter goes, as a generator: it yields coordinates, gets what the rule makes of them,
and returns the update. Alone, the rule is asked for one. In a batch all are begun, the rule is asked once for all, and
each is ended. On a CPU, where launches cost next to nothing, each is alone, on the bits of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import FullShard, Update, has_subspace
from .clock import steps_of
from .rules import Rule
from .rules_together import Clock
from .types import Group, ParamStep, State

AT_ONCE = 2**25  # numbers that a batch makes: 128 MiB in fp32

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


def found_together(directions: Sequence[Direction], rule: Rule, group: Group, clock: Clock) -> Iterator[Towards]:
    """What directions come to, one after the other, by one call of the rule."""
    assert rule.together is not None
    coordinates, states = zip(*map(next, directions), strict=True)
    moved, correction = rule.together(coordinates, states, group, clock)
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


class Batch(NamedTuple):
    """Parameters that move together; ``in_place`` where they need no memory for it."""

    items: list[ParamStep]
    in_place: bool = False


def batches(
    portion: Sequence[ParamStep], may: Callable[[ParamStep], bool], in_place: Callable[[ParamStep], bool]
) -> Iterator[Batch]:
    """The parameters of a portion, those together that ``may`` be and are alike in group, clock, dtype and device, on
    every process in the same order."""
    waiting: dict[tuple[object, ...], list[ParamStep]] = {}
    for item in portion:
        if not (launches_cost(item.shard.device) and may(item)):
            yield Batch([item])
            continue
        held = [state.dtype for key, state in item.state.items() if key != "step"]
        own = in_place(item)
        kind = own, id(item.group), steps_of(item.state), item.shard.device, item.shard.dtype, *held
        batch = waiting.setdefault(kind, [])
        if not own and batch and sum(map(numbers_of, [*batch, item])) > AT_ONCE:
            yield Batch(waiting.pop(kind))
            batch = waiting.setdefault(kind, [])
        batch.append(item)
    for kind, batch in waiting.items():
        yield Batch(batch, bool(kind[0]))


def numbers_of(item: ParamStep) -> int:
    """How many numbers are made to move a parameter: coordinates of all of a matrix, for what a process has of them may
    differ, and their direction; or the direction alone of what is not gathered."""
    shard = item.shard
    if has_subspace(shard):
        return 2 * math.prod(shard.side.projected_shape)
    places = item.state.get("indices")
    return shard.parameter.numel() if places is None else 2 * len(places)


def decay_together(weights: Sequence[Tensor], group: Group) -> None:
    """W <- W - lr * weight_decay * W."""
    if decay := group["lr"] * group["weight_decay"]:
        torch._foreach_mul_(list(weights), 1 - decay)


def clock_of(items: Sequence[ParamStep]) -> Clock:
    """What gives the clock that the parameters of a batch have in common, on their device."""
    shard = items[0].shard
    return partial(shard.workspace.number, steps_of(items[0].state), shard.device)


def move_in_place(items: Sequence[ParamStep], rule: Rule) -> None:
    """Parameters that no method has a direction of its own for, moved by one call."""
    assert rule.in_place is not None
    group, weights = items[0].group, [item.shard.parameter for item in items]
    if rule.decay_first:
        decay_together(weights, group)
    rule.in_place(weights, [item.take_grad() for item in items], [item.state for item in items], group, clock_of(items))
    if not rule.decay_first:
        decay_together(weights, group)


def write_together(shards: Sequence[FullShard], towards: Iterator[Towards], group: Group, decay_first: bool) -> None:
    """``FullShard.write`` of each, in the same order on every process."""
    weights = [shard.parameter for shard in shards]
    if decay_first:
        decay_together(weights, group)
    dense: list[tuple[Tensor, Tensor]] = []
    for shard, (update, correction) in zip(shards, towards, strict=True):
        step = -group["lr"] * correction
        if isinstance(update, Tensor) and not has_subspace(shard):
            dense.append((shard.parameter, update))
        else:
            shard.add_(update, step)
    if dense:
        torch._foreach_add_([W for W, _ in dense], [own for _, own in dense], alpha=step)
    if not decay_first:
        decay_together(weights, group)
