"""``torch.compile(optimizer.step)``: the arithmetic of each batch is one graph.

What a step decides and sends stays outside: clocks, layouts, new subspaces. What is left is tensors and numbers, and
the numbers that change are tensors too (``optim/numbers.py``): nothing is compiled again for another step or learning
rate. Alike batches share a graph, by a copy of the traced function for each kind: torch counts by function what it
compiles, and gives up after eight shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ...fp64 import widest
from ...int8_weight import Int8Weight
from ..distributed import FullShard, stack_of
from ..numbers import Number, is_zero
from ..state.spec import PLAIN, Codec
from .batches import Batch, Way
from .clock import steps_of
from .types import Group, ParamStep, State


class Optimizer(Protocol):
    """What is asked of an optimizer here."""

    moment_codec: ClassVar[Codec]
    only_read: ClassVar[tuple[str, ...]]

    def why_not_captured(self, group: Group) -> str | None: ...
    def update(self, G: Tensor, shard: FullShard, group: Group, state: State) -> None: ...
    def update_each(
        self, gradients: Sequence[Tensor], shards: Sequence[FullShard], group: Group, states: Sequence[State]
    ) -> None: ...


Arithmetic = Callable[[Optimizer, list[Tensor], list[FullShard], Group, list[State]], None]
MOST = 256  # kinds of batches that are compiled
# What torch.compile has functions compiled by that are called now; there is none in older versions of torch.
compiler_in_use = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)


class Graphs:
    """The functions of an optimizer that are traced, by the kind of batch."""

    def __init__(self) -> None:
        self._of_kind: dict[tuple[object, ...], Arithmetic] = {}

    def move(self, optimizer: Optimizer, batch: Batch, compiler: Any) -> None:
        """Move a batch by code of ``compiler``, torch's callback."""
        items = batch.items
        states: list[State] = [dict(item.state) for item in items]
        gradients, shards = [item.take_grad() for item in items], [item.shard for item in items]
        if batch.way is not Way.STACKED:
            function = _move_alone if len(items) == 1 else _move_together
            self._run(function, compiler, optimizer, gradients, shards, _with_tensors(items[0], states), states)
            return
        # what lies how in memory is found outside: a graph knows nothing of it
        shard = stack_of(shards)
        held = shard.state([item.state for item in items], optimizer.only_read)
        G, state = shard.stack_gradients(gradients), dict(held)
        assert shard.in_one_piece
        self._run(_move_alone, compiler, optimizer, [G], [shard], _with_tensors(items[0], [state]), [state])
        held.write_back()

    def _run(
        self,
        function: Arithmetic,
        compiler: Any,
        optimizer: Optimizer,
        gradients: list[Tensor],
        shards: Sequence[FullShard],
        group: Group,
        states: list[State],
    ) -> None:
        kind = function, group["group_number"], *map(_kind, gradients, shards, states)
        if kind not in self._of_kind and len(self._of_kind) < MOST:
            self._of_kind[kind] = _copy_of(function, len(self._of_kind))
        compiled = self._of_kind.get(kind)
        set_compiler = torch._C._dynamo.eval_frame.set_eval_frame  # called here: another function would be compiled
        before = set_compiler(None if compiled is None else compiler)
        try:
            (compiled or function)(optimizer, gradients, list(shards), group, states)
        finally:
            set_compiler(before)


def is_traced(optimizer: Optimizer, item: ParamStep) -> bool:
    """Whether a parameter's step is arithmetic of tensors and numbers, which a graph can hold."""
    whole = optimizer.moment_codec is PLAIN and not item.group["stochastic_rounding"] and not item.shard.split
    whole = whole and not isinstance(item.shard.parameter, Int8Weight)
    return whole and optimizer.why_not_captured(item.group) is None


def _with_tensors(item: ParamStep, states: Sequence[State]) -> Group:
    """The group of alike parameters with tensors for the numbers that change; their counters in ``states`` likewise."""
    shard, group = item.shard, item.group
    dtype = widest(shard.device)

    def made(key: str, number: Number) -> Tensor:
        return number if isinstance(number, Tensor) else shard.workspace.number(number, shard.device, dtype, key)

    if not group["capturable"]:
        for state in states:
            state["step"] = made("step", steps_of(item.state))
    changing = {} if is_zero(group["weight_decay"]) else {"weight_decay": made("decay", group["weight_decay"])}
    if group["lr"] is not None:
        changing["lr"] = made("lr", group["lr"])
    return {**group, **changing, "capturable": True}


def _kind(gradient: Tensor, shard: FullShard, state: Mapping[str, Tensor]) -> tuple[object, ...]:
    held = (gradient, shard.parameter, *state.values())
    return type(shard), tuple(state), *((t.shape, t.stride(), t.dtype, t.device) for t in held)


def _copy_of(function: Arithmetic, number: int) -> Arithmetic:
    """By another name: torch takes sizes for variable that differ from one call of a function to the next."""
    assert isinstance(function, FunctionType)
    code = function.__code__
    return FunctionType(code.replace(co_name=f"{code.co_name}_{number}"), function.__globals__)


# ---- what is traced -------------------------------------------------------------------------------------------------


def _move_alone(
    optimizer: Optimizer, gradients: list[Tensor], shards: list[FullShard], group: Group, states: list[State]
) -> None:
    optimizer.update(gradients[0], shards[0], group, states[0])


def _move_together(
    optimizer: Optimizer, gradients: list[Tensor], shards: list[FullShard], group: Group, states: list[State]
) -> None:
    optimizer.update_each(gradients, shards, group, states)
