"""State that knows no processes: whole tensors by parameter, to resume on more or fewer of them or in another layout.

An engine's own checkpoints are faster and exact to the bit, but hold each process's slices. Here a matrix's lines are
put together again. Which dimension of a tensor counts lines is not written down anywhere: it is the one that grows when
the matrix gets one line more, asked of the method on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .core.optimizer import Group, ShardedOptimizer, State
from .distributed import FlatShard, FullMatrix, FullShard, MatrixShard, ParamRef, has_subspace, put_together
from .distributed.projection import Workspace
from .state.blockwise_8bit import close, opened

FORMAT = 1


@torch.no_grad()
def full_state(optimizer: ShardedOptimizer) -> dict[str, Any]:
    """Everything that ``optimizer`` remembers, and the weights where it holds them in parts.

    Collective: every process calls it, after the first step. Process 0 of each parameter's group gets the tensors, on
    the CPU; the others an empty mapping. 8-bit moments are given in fp32.
    """
    parameters: dict[int, dict[str, Tensor]] = {}
    for member, shard, group, state in _held(optimizer):
        whole, spread = {}, optimizer.spread(shard, group, state)
        for key, (shape, axis) in _whole_state(optimizer, shard, group).items():
            value = opened(spread, key, shard) if f"{key}_absmax" in spread else spread[key]
            if key.startswith("basis") and has_subspace(shard):
                value = shard.collected(value, shape[0])
            whole[key] = _gathered(value, axis, shard)
        if isinstance(shard, (FlatShard, MatrixShard)):
            whole["weight"] = put_together(shard.parameter, shard.piece, 0)
        if all(value is not None for value in whole.values()):
            parameters[member.position] = {key: value.cpu() for key, value in whole.items() if value is not None}
    return {"format": FORMAT, "class": type(optimizer).__name__, "parameters": parameters} if parameters else {}


def full_state_of(class_name: str, saved: dict[str, Any]) -> dict[str, Any]:
    """The full state from the ``state_dict()`` of an optimizer of that class that is not split over processes."""
    parameters = {
        position: {
            key: opened(state, key) if f"{key}_absmax" in state else value
            for key, value in state.items()
            if not key.endswith("_absmax")
        }
        for position, state in saved["state"].items()
    }
    return {"format": FORMAT, "class": class_name, "parameters": parameters}


@torch.no_grad()
def load_full_state(optimizer: ShardedOptimizer, saved: dict[str, Any]) -> None:
    """Take over what ``full_state`` gave, in whatever layout this process is. Every process passes all of it.

    Raises:
        ValueError: where ``saved`` is of another class or of other parameters; nothing is changed then.
    """
    if saved.get("format") != FORMAT or saved.get("class") != type(optimizer).__name__:
        raise ValueError(
            f"the full state is of {saved.get('class')!r} in format {saved.get('format')!r}, expected "
            f"{type(optimizer).__name__!r} in format {FORMAT}"
        )
    held = list(_held(optimizer))
    fresh = []
    for member, shard, group, _ in held:
        own = saved["parameters"].get(member.position)
        if own is None:
            raise ValueError(f"the full state has nothing of parameter {member.position}, of shape {member.shape}")
        whole = FullShard(torch.empty(member.shape, device="meta"), member.position, Workspace())
        own = {**optimizer.spread(whole, group, dict(own))}  # what one process saved is as it held it
        fresh.append(_part(optimizer, own, member, shard, group))
    for (member, shard, group, state), part in zip(held, fresh, strict=True):
        for key, value in optimizer.settled(shard, group, part).items():
            state[key] = value
        own = saved["parameters"][member.position]
        if "weight" in own:
            shard.parameter.copy_(_own_weights(own["weight"], shard))


def _held(optimizer: ShardedOptimizer) -> Iterator[tuple[ParamRef, FullShard, Group, State]]:
    for group, parameters in optimizer.stepped_parameters():
        for p in parameters:
            if p.requires_grad:
                for member, shard, state in optimizer.shards_of(p, group, Workspace()):
                    yield member, shard, group, state


def _whole_state(
    optimizer: ShardedOptimizer, shard: FullShard, group: Group
) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """For each key of the state its shape for the whole parameter, and the dimension that counts lines, if any does."""
    states = []
    for more in (0, 1):
        if has_subspace(shard):
            m, n = shard.frame.shape
            shape = (m + more, n) if shard.frame.right else (m, n + more)
            frame = replace(shard.frame, shape=shape)
            meta: FullShard = FullMatrix(torch.empty(shape, device="meta"), 0, Workspace(), frame)
        else:
            size = (shard.shape[0] + more, *shard.shape[1:]) if shard.shape else (1 + more,)
            meta = FullShard(torch.empty(size, device="meta"), 0, Workspace())
        states.append(optimizer.spread_state(meta, group))
    axes = {}
    for key, value in states[0].items():
        pairs = enumerate(zip(value.shape, states[1][key].shape, strict=True))
        if not key.endswith("_absmax"):  # those are scales of codes, which are opened
            axes[key] = tuple(value.shape), next((axis for axis, (a, b) in pairs if a != b), None)
    return axes


def _gathered(value: Tensor, axis: int | None, shard: FullShard) -> Tensor | None:
    """The whole of which ``value`` is this process's part, at process 0; None at the others."""
    if not isinstance(shard, (FlatShard, MatrixShard)):
        return value.clone()
    if axis is None:
        return value.clone() if shard.piece.world.rank == 0 else None
    if isinstance(shard, FlatShard):
        return put_together(value, shard.piece, 0)
    own = shard.own_lines(value.movedim(axis, 0))
    lines = [last - first for first, last in shard.line_ranges]
    line = own[:1].numel() if len(own) else math.prod(own.shape[1:])
    flat = shard.world.gather(own.contiguous().view(-1), [count * line for count in lines], 0)
    return None if flat is None else flat.view(sum(lines), *own.shape[1:]).movedim(0, axis).contiguous()


def _own_weights(weight: Tensor, shard: FullShard) -> Tensor:
    if not isinstance(shard, (FlatShard, MatrixShard)):
        return weight.view(shard.parameter.shape)
    return weight.reshape(-1).narrow(0, shard.piece.start, shard.piece.numel)


def _part(
    optimizer: ShardedOptimizer, whole: dict[str, Tensor], member: ParamRef, shard: FullShard, group: Group
) -> dict[str, Tensor]:
    """This process's part of the state of one parameter."""
    part = dict(optimizer.spread_state(shard, group))
    for key, (_, axis) in _whole_state(optimizer, shard, group).items():
        if key not in whole:
            raise ValueError(f"the full state of parameter {member.position} has no {key!r}; it has {sorted(whole)}")
        value = whole[key]
        if axis is not None and isinstance(shard, FlatShard):
            value = value.reshape(-1)[shard.piece.start : shard.piece.start + shard.piece.numel]
        elif axis is not None and isinstance(shard, MatrixShard):
            first, last = shard.lines
            value = value.narrow(axis, first, last - first)
        elif key.startswith("basis") and has_subspace(shard):
            value = shard.kept(value)
        if value.shape != part[key].shape:
            raise ValueError(
                f"{key!r} of parameter {member.position} has shape {tuple(whole[key].shape)} in the full state, which "
                f"does not fit a parameter of shape {member.shape} in this optimizer"
            )
        if f"{key}_absmax" in part:
            close(value.to(part[key].device).contiguous(), part, key, shard)
        else:
            part[key].copy_(value)
    return part
