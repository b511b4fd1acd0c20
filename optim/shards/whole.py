"""A parameter that this process holds entirely: one process, or a replica under DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..subspaces.basis import Basis, Frame, Lifted


class UnsupportedLayout(RuntimeError):
    """A matrix is split over processes in a way that its method cannot handle."""


class Whole:
    """A tensor of any shape whose moments live in its own coordinates."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

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
        return group["state_dtype"] or torch.promote_types(self.parameter.dtype, torch.float32)

    def write(self, direction: Tensor | Lifted, step_size: float, decay: float, decay_first: bool) -> None:
        """W <- W - step_size * direction, and W <- W - decay * W before or, as in GaLore's code, after it."""
        W = self.parameter
        if decay and decay_first:
            W.mul_(1 - decay)
        if isinstance(direction, Lifted):
            direction.add_to_(W, -step_size)
        else:
            W.add_(direction, alpha=-step_size)
        if decay and not decay_first:
            W.add_(W, alpha=-decay)


class WholeMatrix(Whole):
    """An m x n matrix whose moments live in a subspace of rank r."""

    def __init__(self, parameter: Tensor, frame: Frame) -> None:
        super().__init__(parameter)
        self.frame = frame

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        return self.frame.projected_shape

    def basis(self, state: dict[str, Tensor]) -> Basis:
        return Basis(state["basis"], self.frame)


def shard_of(parameter: Tensor, group: dict[str, Any]) -> Whole:
    """What this process holds of ``parameter``.

    Raises UnsupportedLayout where a matrix with a rank is not whole here (DeepSpeed ZeRO, FSDP): its rows would be
    projected as if they were the matrix, and the result would be something else.
    """
    if group.get("rank") is None:
        return Whole(parameter)
    split = hasattr(parameter, "device_mesh")  # a DTensor; importing its class would double the import time
    if split or parameter.dim() != 2:
        held = "a DTensor (FSDP2)" if split else f"{parameter.dim()}-D here (DeepSpeed ZeRO?)"
        raise UnsupportedLayout(
            f"rank={group['rank']} needs whole matrices, but a parameter of its group is {held}; "
            "train on one process or with DistributedDataParallel, or leave rank out of the group"
        )
    return WholeMatrix(parameter, Frame.of((parameter.shape[0], parameter.shape[1]), group["rank"], group["proj_type"]))
