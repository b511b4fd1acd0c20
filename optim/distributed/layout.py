"""How a parameter is split over processes, where no optimizer steps it, or FSDP2 splits it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .flat import FlatShard
from .full import FullShard
from .process_group import ProcessGroup
from .shard_range import ShardRange
from .workspace import Workspace


class UnsupportedLayout(RuntimeError):
    """A parameter is split over processes in a way that its method cannot handle."""


@dataclass(frozen=True)
class ParamRef:
    """A parameter as the optimizer was given it.

    Reached through its group's list: accelerate takes the parameters out of that list before it splits them, and a
    reference kept here would hold each whole one in memory.
    """

    params: list[Tensor]
    index: int
    position: int  # among all parameters of the optimizer: the same on every process
    shape: tuple[int, ...]

    @property
    def parameter(self) -> Tensor:
        return self.params[self.index]


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of all of a parameter: DeepSpeed's zero.Init leaves ``shape`` empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # importing the class would take long


def local_flat(tensor: Any) -> Tensor:
    """What this process holds of a tensor that may be a DTensor, flat."""
    local: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return local.reshape(-1)


def fsdp_range(parameter: Any) -> ShardRange:
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
    processes = ProcessGroup.for_tensors_on(parameter.to_local().device, mesh.get_group())
    share = -(-shape[0] // processes.size)
    bounds = tuple(min(i * share, shape[0]) * row for i in range(processes.size + 1))
    held = ShardRange(shape, bounds, 0, processes, chunked=True)
    if parameter.to_local().numel() != held.numel:
        raise UnsupportedLayout(f"a DTensor of shape {shape} holds {parameter.to_local().numel()} elements here")
    return held


def held_shard(parameter: Any, position: int = -1) -> FullShard:
    """What this process holds of a parameter itself, where no optimizer steps it, or not yet: ZeRO 3 and FSDP2 split
    frozen ones too, and those that zero.Init makes, in 16 bits."""
    if is_dtensor(parameter):
        local = parameter.to_local().detach().view(-1)
        return FlatShard(local, local, fsdp_range(parameter), position, Workspace())
    if not hasattr(parameter, "ds_tensor"):
        return FullShard(parameter.detach(), position, Workspace())
    part, count = parameter.partition_numel(), parameter.ds_numel
    processes = ProcessGroup.for_tensors_on(parameter.ds_tensor.device, parameter.ds_process_group)
    bounds = tuple(min(i * part, count) for i in range(processes.size + 1))
    held = ShardRange(full_shape(parameter), bounds, 0, processes)
    own = held.of(parameter.ds_tensor.detach().view(-1))
    return FlatShard(own, own, held, position, Workspace())
