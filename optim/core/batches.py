"""Parameters that are moved together: on a GPU a launch costs as much as the arithmetic of a small matrix.

A method says once where one parameter goes, as a generator: it yields coordinates, gets what the rule makes of them,
and returns the update. Alone, the rule is asked for one. In a batch all are begun, the rule is asked once for all, and
each is ended. Where a method is written over leading dimensions, alike matrices are one stack (``stacks.py`` of
``distributed``), and all of it is asked once. On a CPU, where launches cost next to nothing, each is alone, on the bits
of the authors' code; but small matrices that were born in one tensor, as those of experts, are a stack there too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import FullShard, StackedState, Update, has_subspace, spans, stacked
from ..numbers import Number, add_each_, decay_of, is_zero
from .clock import steps_of
from .rules import MOMENTS, Rule
from .rules_together import Clock
from .types import Group, ParamStep, State

AT_ONCE = 5 * 2**23  # numbers that a batch makes: 160 MiB in fp32
MATRICES_AT_ONCE = 3 * 2**25  # that one of matrices makes, copies of gradients and state among them: 384 MiB
IN_A_SPAN = 2**20  # that are made on the way, where one parameter's are made in spans
ON_A_CPU = 2**22  # that one of matrices makes there: 16 MiB
# Elements of a matrix, from which on it gives a GPU enough to do by itself: of a method with many kernels a matrix, and
# of one with few, for which a copy of a gradient costs more than the launches that it saves. And on a CPU.
MANY_BELOW, FEW_BELOW, BORN_STACKED_BELOW = 2**24, 2**20, 2**16

Found = tuple[Tensor, Number]  # the direction of coordinates, and the factor on the learning rate
Towards = tuple[Update, Number]  # the same of a parameter
Direction = Generator[tuple[Tensor, State], Found, Towards]


def found_alone(direction: Direction, rule: Rule, group: Group, shard: FullShard, spend: bool = False) -> Towards:
    """What a direction, of one parameter or of a stack, comes to, by a call of the rule of its own; ``spend``: the
    memory of large coordinates may be that of what the rule makes of them."""
    try:
        coordinates, state = next(direction)
    except StopIteration as end:  # a rule of its own
        return _returned(end)
    in_spans = spend and is_asked_in_spans(rule, coordinates, state)
    found = (asked_in_spans if in_spans else ask)(rule, coordinates, state, group, shard)
    del coordinates  # before what is made of their direction
    return _ended(direction, found)


def is_asked_in_spans(rule: Rule, coordinates: Tensor, state: State) -> bool:
    """Whether coordinates are so large that what a rule makes on the way should not be another tensor of their size."""
    large = coordinates.dim() == 2 and coordinates.numel() > 4 * IN_A_SPAN
    if rule.together is None or not (large and launches_cost(coordinates.device)) or torch.compiler.is_compiling():
        return False
    held = [state[key] for key in MOMENTS if key in state]
    return all(own.is_contiguous() for own in (coordinates, *held))


def asked_in_spans(rule: Rule, coordinates: Tensor, state: State, group: Group, shard: FullShard) -> Found:
    """``ask`` of some elements at a time; ``coordinates`` are used up."""
    assert rule.together is not None
    keys, flat = [key for key in MOMENTS if key in state], coordinates.view(-1)
    wide = state[keys[0]].dtype
    found = flat if flat.dtype == wide else torch.empty_like(flat, dtype=wide)
    for span in spans(len(flat), IN_A_SPAN):
        own: State = {"step": state["step"], **{key: state[key].view(-1)[span] for key in keys}}
        (moved,), correction = rule.together([flat[span]], [own], group, clock_of(state, shard))
        found[span] = moved
        del moved  # before the next
    return found.view(coordinates.shape), correction


def ask(rule: Rule, coordinates: Tensor, state: State, group: Group, shard: FullShard) -> Found:
    """What a rule makes of coordinates, of a stack too: by as few kernels as it can, where launches cost."""
    if rule.together is None or not (launches_cost(coordinates.device) and coordinates.numel()):
        return rule.direction(coordinates, state, group)
    keys = [key for key in MOMENTS if key in state]
    states = state.parts(keys) if isinstance(state, StackedState) else [state]
    clock = clock_of(state, shard)
    if len(states) == 1:
        (moved,), correction = rule.together([coordinates], states, group, clock)
        return moved, correction
    each, correction = rule.together(list(coordinates), states, group, clock)
    return stacked(each)[0], correction


def found_together(directions: Sequence[Direction], rule: Rule, group: Group, shard: FullShard) -> Iterator[Towards]:
    """What directions come to, one after the other, by one call of the rule; ``shard`` is one of theirs."""
    assert rule.together is not None
    coordinates, states = zip(*map(next, directions), strict=True)
    moved, correction = rule.together(coordinates, states, group, clock_of(states[0], shard))
    del coordinates
    for direction, own in zip(directions, moved, strict=True):
        yield _ended(direction, (own, correction))


def _ended(direction: Direction, found: Found) -> Towards:
    try:
        direction.send(found)
    except StopIteration as end:
        return _returned(end)
    raise RuntimeError("a direction asks the rule once")


def _returned(end: StopIteration) -> Towards:
    towards: Towards = end.args[0]  # its ``value``, which torch.compile does not trace
    return towards


def launches_cost(device: torch.device) -> bool:
    """Whether to launch a kernel takes as long as to run it on a small matrix."""
    return device.type != "cpu"


def is_born_small(shard: FullShard) -> bool:
    """Whether matrices were born in one tensor, and are so small that a CPU moves them faster as one."""
    return shard.born_stacked and shard.parameter.numel() <= BORN_STACKED_BELOW


def is_stacked_at(elements: int, few_kernels: bool) -> bool:
    """Whether matrices of so many elements are worth being copied into a stack."""
    return elements < (FEW_BELOW if few_kernels else MANY_BELOW)


class Way(Enum):
    """How a parameter may be moved."""

    ALONE = "by itself"
    TOGETHER = "the rule is asked once for several"
    IN_PLACE = "the rule moves several weights, in no memory of its own"
    STACKED = "as one of several alike matrices"
    IN_LOTS = "in pieces, with those of others"


class Batch(NamedTuple):
    """Parameters that move together."""

    items: list[ParamStep]
    way: Way = Way.ALONE


class Movable(NamedTuple):
    """How a parameter may be moved, how many numbers are then made, and what those of a batch have in common beside
    group, clock, dtypes and device."""

    way: Way = Way.ALONE
    numbers: int = 0
    kind: object = None


BY_ITSELF = Movable()


def batches(portion: Sequence[ParamStep], movable: Callable[[ParamStep, bool], Movable]) -> Iterator[Batch]:
    """The parameters of a portion, those together that are alike, on every process in the same order.

    ``movable`` says how one may be moved; asked with False, without a stack: there is none of one matrix.
    """
    found = [movable(item, True) for item in portion]
    if all(how.way is Way.ALONE for how in found):
        yield from (Batch([item]) for item in portion)
        return
    kinds = [_kind(item, how) for item, how in zip(portion, found, strict=True)]
    alike = Counter(kinds)
    waiting: dict[tuple[object, ...], list[ParamStep]] = {}
    numbers: Counter[tuple[object, ...]] = Counter()
    for item, how, kind in zip(portion, found, kinds, strict=True):
        if how.way is Way.STACKED and alike[kind] == 1:
            how = movable(item, False)
            kind = _kind(item, how)
        if how.way is Way.ALONE:
            yield Batch([item])
            continue
        batch = waiting.setdefault(kind, [])
        if batch and numbers[kind] + how.numbers > _most(item.shard, how.way):
            yield _batch(kind, waiting.pop(kind))
            batch, numbers[kind] = waiting.setdefault(kind, []), 0
        batch.append(item)
        numbers[kind] += how.numbers
    for kind, batch in waiting.items():
        yield _batch(kind, batch)


def _most(shard: FullShard, way: Way) -> int:
    """How many numbers a batch may make."""
    if not launches_cost(shard.device):
        return ON_A_CPU
    return MATRICES_AT_ONCE if way is Way.STACKED else AT_ONCE


def _batch(kind: tuple[object, ...], items: list[ParamStep]) -> Batch:
    way = kind[0]
    assert isinstance(way, Way)
    return Batch(items) if way is Way.STACKED and len(items) == 1 else Batch(items, way)


def _kind(item: ParamStep, how: Movable) -> tuple[object, ...]:
    if how.way is Way.ALONE:
        return (how.way,)
    held = [state.dtype for key, state in item.state.items() if key != "step"]
    return (how.way, how.kind, id(item.group), steps_of(item.state), item.shard.device, item.shard.dtype, *held)


def numbers_of(item: ParamStep) -> int:
    """How many numbers are made to move a parameter: coordinates of all of a matrix, for what a process has of them may
    differ, and their direction; or the direction alone of what is not gathered."""
    shard, held = item.shard, item.shard.held_gradient
    if has_subspace(shard):
        return 2 * math.prod(shard.side.projected_shape)
    places = item.state.get("indices")
    numbers = shard.parameter.numel() if places is None else 2 * len(places)
    narrow = held is not None and any(key in item.state and item.state[key].dtype != held.dtype for key in MOMENTS)
    return 2 * numbers if narrow else numbers  # a copy of it is made wider


def decay_together(weights: Sequence[Tensor], group: Group) -> None:
    """W <- W - lr * weight_decay * W."""
    if not is_zero(decay := decay_of(group)):
        torch._foreach_mul_(list(weights), 1 - decay)


def clock_of(state: State, shard: FullShard) -> Clock:
    """What gives the clock that the parameters of a batch have in common, on their device."""
    return lambda: shard.workspace.number(steps_of(state), shard.device)


def move_in_place(items: Sequence[ParamStep], rule: Rule) -> None:
    """Parameters that no method has a direction of its own for, moved by one call."""
    assert rule.in_place is not None
    group, weights = items[0].group, [item.shard.parameter for item in items]
    if rule.decay_first:
        decay_together(weights, group)
    clock = clock_of(items[0].state, items[0].shard)
    rule.in_place(weights, [item.take_grad() for item in items], [item.state for item in items], group, clock)
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
        add_each_([W for W, _ in dense], [own for _, own in dense], step)
    if not decay_first:
        decay_together(weights, group)
