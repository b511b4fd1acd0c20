"""A parameter that this process holds entirely: one process, or a replica under DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..subspaces.basis import Frame, Lifted, Room

FrameOf = Callable[[tuple[int, int], dict[str, Any]], Frame]


class UnsupportedLayout(RuntimeError):
    """A matrix is split over processes in a way that its method cannot handle."""


class Whole:
    """A tensor of any shape whose moments live in its own coordinates."""

    def __init__(self, parameter: Tensor, position: int, room: Room) -> None:
        self.parameter = parameter
        self.position = position  # among all parameters of the optimizer: the same on every process
        self.room = room

    @property
    def host(self) -> str:
        """Where clocks live: the CPU, or nowhere when only shapes are asked for."""
        return "meta" if self.parameter.device.type == "meta" else "cpu"

    @property
    def grad(self) -> Tensor:
        grad = self.parameter.grad
        assert grad is not None, "only parameters with a gradient are stepped"
        return grad

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        """The shape of what the rule sees."""
        return tuple(self.parameter.shape)

    def state_dtype(self, group: dict[str, Any]) -> torch.dtype:
        """Moments are fp32 at least, also for bf16 parameters, unless the group says otherwise: with b2 = 0.999
        a bf16 second moment cannot take up increments of a tenth of a percent."""
        return group.get("state_dtype") or torch.promote_types(self.parameter.dtype, torch.float32)

    def norm(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The Frobenius norm of a tensor laid out as this parameter; a scalar on its device."""
        norm: Tensor = torch.linalg.vector_norm(like, dtype=dtype)
        return norm

    def write(self, direction: Tensor | Lifted, step_size: float, decay: float | Tensor, decay_first: bool) -> None:
        """W <- W - step_size * direction, and W <- W - decay * W before or, as in GaLore's code, after it.

        A decay that is a tensor comes first.
        """
        W = self.parameter
        if isinstance(decay, Tensor) or (decay and decay_first):  # a tensor is not asked: that would stop the device
            W.mul_(1 - decay)
        if isinstance(direction, Lifted):
            direction.write_to_(W, -step_size, self.room)
        else:
            W.add_(direction, alpha=-step_size)
        if not (decay_first or isinstance(decay, Tensor)) and decay:
            W.add_(W, alpha=-decay)


class WholeMatrix(Whole):
    """An m x n matrix whose moments live in a subspace of rank r."""

    def __init__(self, parameter: Tensor, position: int, room: Room, frame: Frame) -> None:
        super().__init__(parameter, position, room)
        self.frame = frame

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        return self.frame.projected_shape

    def row_norms(self, dense: Tensor) -> Tensor:
        """m x 1."""
        norms: Tensor = torch.linalg.vector_norm(dense, dim=1, keepdim=True)
        return norms


def shard_of(parameter: Tensor, group: dict[str, Any], position: int, room: Room, frame: FrameOf) -> Whole:
    """What this process holds of ``parameter``; ``frame`` says where the subspace of an m x n matrix lies.

    Raises UnsupportedLayout where a matrix with a rank is not whole here (DeepSpeed ZeRO, FSDP): its rows would be
    projected as if they were the matrix, and the result would be something else.
    """
    if group.get("rank") is None:
        return Whole(parameter, position, room)
    split = hasattr(parameter, "device_mesh")  # a DTensor; importing its class would double the import time
    if split or parameter.dim() != 2:
        held = "a DTensor (FSDP2)" if split else f"{parameter.dim()}-D here (DeepSpeed ZeRO?)"
        raise UnsupportedLayout(
            f"rank={group['rank']} needs whole matrices, but a parameter of its group is {held}; "
            "train on one process or with DistributedDataParallel, or leave rank out of the group"
        )
    shape = (parameter.shape[0], parameter.shape[1])
    return WholeMatrix(parameter, position, room, frame(shape, group))
