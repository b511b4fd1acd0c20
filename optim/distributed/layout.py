"""What this process holds of each parameter, found in the first step: no engine is asked and none is imported.

DeepSpeed's attributes are private. They are read here alone, and what is read is compared with the weights themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .full import FullShard
from .process_group import ProcessGroup
from .projection import Workspace
from .sliced import FlatShard, ShardRange


class UnsupportedLayout(RuntimeError):
    """A parameter is split over processes in a way that its method cannot handle."""


@dataclass(frozen=True)
class ParamRef:
    """A parameter as the optimizer was given it.

    Reached through its group's list: accelerate takes the parameters out of that list before it splits them, and a
    reference kept here would hold each whole one in memory.
    """

    held: list[Tensor]
    index: int
    position: int  # among all parameters of the optimizer: the same on every process
    shape: tuple[int, ...]

    @property
    def parameter(self) -> Tensor:
        return self.held[self.index]


class PrefixedState(MutableMapping[str, Tensor]):
    """The state of one member in the state of a flat tensor that holds several: every key begins with its position."""

    def __init__(self, held: dict[str, Tensor], position: int) -> None:
        self.held, self.prefix = held, f"{position}."

    def __getitem__(self, key: str) -> Tensor:
        return self.held[self.prefix + key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.held[self.prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self.held[self.prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self.prefix) for key in list(self.held) if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """DeepSpeed's zero.Init leaves ``shape`` empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def rows_of(parameter: Any) -> ShardRange:
    """The slice that this process holds of a DTensor (FSDP2).

    Raises:
        UnsupportedLayout: for a mesh of several dimensions, or a tensor that is not split by rows.
    """
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise UnsupportedLayout(
            f"a parameter is a DTensor placed as {placements} on a mesh of {mesh.ndim} dimension(s); only rows over "
            "one dimension (fully_shard on a 1-D mesh) are supported, no tensor parallelism"
        )
    shape = tuple(parameter.shape)
    row = math.prod(shape[1:])
    world = ProcessGroup.for_tensors_on(parameter.to_local().device, mesh.get_group())
    share = -(-shape[0] // world.size)
    bounds = tuple(min(i * share, shape[0]) * row for i in range(world.size + 1))
    piece = ShardRange(shape, bounds, 0, world, chunked=True)
    if parameter.to_local().numel() != piece.numel:
        raise UnsupportedLayout(f"a DTensor of shape {shape} holds {parameter.to_local().numel()} elements here")
    return piece


def held_shard(parameter: Any, position: int = -1) -> FullShard:
    """What this process holds of a parameter itself, where no optimizer steps it, or not yet: ZeRO 3 and FSDP2 split
    frozen ones too, and those that zero.Init makes, in 16 bits."""
    if hasattr(parameter, "device_mesh"):
        local = parameter.to_local().detach().view(-1)
        return FlatShard(local, local, rows_of(parameter), position, Workspace())
    if not hasattr(parameter, "ds_tensor"):
        return FullShard(parameter.detach(), position, Workspace())
    part, count = parameter.partition_numel(), parameter.ds_numel
    world = ProcessGroup.for_tensors_on(parameter.ds_tensor.device, parameter.ds_process_group)
    bounds = tuple(min(i * part, count) for i in range(world.size + 1))
    piece = ShardRange(full_shape(parameter), bounds, 0, world)
    own = piece.of(parameter.ds_tensor.detach().view(-1))
    return FlatShard(own, own, piece, position, Workspace())


def pieces_of(flat: Tensor, members: list[ParamRef]) -> list[tuple[ParamRef, ShardRange]]:
    """The members of one group that lie in DeepSpeed's flat partition ``flat``, in the same order on every process.

    Raises:
        UnsupportedLayout: for a flat tensor of another origin, or a DeepSpeed whose layout is not what it was.
    """
    if not members:
        raise UnsupportedLayout(f"a group holds a tensor of shape {tuple(flat.shape)} that the optimizer was not given")
    try:
        first = members[0].parameter
        return _zero3(flat, members) if hasattr(first, "ds_id") else _zero12(flat, members)
    except (AttributeError, StopIteration, KeyError, IndexError) as error:
        raise UnsupportedLayout(
            f"a parameter of shape {members[0].shape} was replaced by a tensor of shape {tuple(flat.shape)}, but not "
            f"as DeepSpeed ZeRO 1, 2 or 3 does it ({type(error).__name__}: {error}); known to work: DeepSpeed 0.19, "
            "in 16 bits from stage 1 on"
        ) from None


def flat_tensors(members: list[ParamRef]) -> list[Tensor]:
    """DeepSpeed ZeRO 3's flat partitions of one group, which it shows to the optimizer during ``step`` alone."""
    engine: Any = getattr(members[0].parameter, "_z3_optimizer", None) if members else None
    if engine is None:
        return []
    ours = {id(member.parameter) for member in members}
    parts = zip(engine.fp32_partitioned_groups_flat, engine.fp16_groups, strict=True)
    return [flat for flat, held in parts if id(held[0]) in ours]


def _zero3(flat: Tensor, members: list[ParamRef]) -> list[tuple[ParamRef, ShardRange]]:
    """Each parameter is cut by itself, into equal parts, the last ones short or empty."""
    engine: Any = members[0].parameter._z3_optimizer  # type: ignore[attr-defined]
    number = next(i for i, held in enumerate(engine.fp32_partitioned_groups_flat) if held is flat)
    world = ProcessGroup.for_tensors_on(flat.device, engine.sub_group_process_groups[number])
    by_id = {id(member.parameter): member for member in members}
    found, offset = [], 0
    for p in engine.fp16_groups[number]:
        part, whole = p.partition_numel(), p.ds_numel
        bounds = tuple(min(i * part, whole) for i in range(world.size + 1))
        member = by_id[id(p)]
        found.append((member, _checked(ShardRange(member.shape, bounds, offset, world), flat, p.ds_tensor, 0)))
        offset += part  # also where this process's part is short: the flat tensor is padded
    return found


def _zero12(flat: Tensor, members: list[ParamRef]) -> list[tuple[ParamRef, ShardRange]]:
    """ZeRO 1, 2 and BF16_Optimizer: the 16-bit parameters are views into one buffer, which is cut into equal parts.

    ``_hp_mapping`` would tell this too, but wrongly under ``round_robin_gradients``.
    """
    trained = [m for m in members if m.parameter.requires_grad]
    world = ProcessGroup.for_tensors_on(flat.device, trained[0].parameter._dp_group)  # type: ignore[attr-defined]
    part = flat.numel()
    found = []
    for member in sorted(trained, key=lambda m: m.parameter.storage_offset()):
        begin, numel = int(member.parameter.storage_offset()), math.prod(member.shape)
        bounds = tuple(min(max(i * part - begin, 0), numel) for i in range(world.size + 1))
        start = bounds[world.rank]
        offset = begin + start - world.rank * part if bounds[world.rank + 1] > start else 0
        piece = ShardRange(member.shape, bounds, offset, world)
        found.append((member, _checked(piece, flat, member.parameter.detach().reshape(-1), start)))
    return found


def _checked(piece: ShardRange, flat: Tensor, weights: Tensor, start: int) -> ShardRange:
    """``piece``, if this process's part of the flat tensor holds the weights that it should."""
    if piece.numel and not weights.is_meta:
        held = piece.of(flat.detach())
        expected = weights.narrow(0, start, piece.numel)
        if not torch.equal(held.to(expected.dtype), expected.to(held.device)):
            raise UnsupportedLayout(
                f"DeepSpeed's flat partition does not hold the parameter of shape {piece.shape} where it should; this "
                "DeepSpeed lays them out in another way than 0.19 does"
            )
    return piece
