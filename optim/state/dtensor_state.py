"""State of a parameter that FSDP2 splits, as torch.distributed.checkpoint moves it to more or fewer processes.

``optimizer.state`` holds plain tensors, this process's part of each. ``state_dict`` gives DTensors, which know the
whole. Which dimension is cut is not written down anywhere: it is the one in which the last process, which never has
all, holds less than the whole, asked of the method on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed import FullShard, UnsupportedLayout
from .blockwise_8bit import close, opened

SCALES = "_absmax"


class DTensorState:
    """The tensors of one parameter's state, on the meta device: this process's, the last process's and the whole ones.

    8-bit moments travel in fp32: blocks that share a scale do not end where lines do.
    """

    def __init__(
        self,
        mesh: Any,
        shard: FullShard,
        own: Mapping[str, Tensor],
        last: Mapping[str, Tensor],
        whole: Mapping[str, Tensor],
    ) -> None:
        self.mesh, self.shard, self.own, self.whole = mesh, shard, own, whole
        self.axes = {key: _cut_axis(last[key], whole[key]) for key in own if not key.endswith(SCALES)}

    def shared(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's ``state`` as all processes save it: what is split as DTensors of the whole shape."""
        return {key: self._shared(key, self._wide(state, key)) for key in self.axes}

    def expected(self, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """What fits in the place of ``saved``: whole shapes of DTensors, this process's of plain tensors."""
        return {
            key: self.whole[key] if self._is_whole(key, saved.get(key)) else value
            for key, value in self.own.items()
            if not (key.endswith(SCALES) and _is_wide(saved, key.removesuffix(SCALES)))
        }

    def held(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of ``saved``, which is ``expected``, as ``optimizer.state`` holds it. Collective."""
        state = {key: self._held(key, value) for key, value in saved.items()}
        for key in [key for key in self.axes if key + SCALES in self.own and _is_wide(saved, key)]:
            values, device = state[key], state[key].device
            state |= {name: torch.empty_like(self.own[name], device=device) for name in (key, key + SCALES)}
            close(values.contiguous(), state, key, self.shard)
        return state

    def _wide(self, state: Mapping[str, Tensor], key: str) -> Tensor:
        return opened(state, key, self.shard) if key + SCALES in state else state[key]

    def _shared(self, key: str, value: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard  # here: only FSDP2 needs it, and importing it takes long

        axis, whole = self.axes[key], self.whole[key]
        lines = _as_lines(value, whole).contiguous()  # torch broadcasts states of other strides as other numbers
        if axis is None:
            return lines
        share = -(-whole.shape[axis] // self.mesh.size())
        begin = min(self.mesh.get_local_rank() * share, whole.shape[axis])
        if lines.shape[axis] != min(share, whole.shape[axis] - begin):
            raise UnsupportedLayout(
                f"{key!r} of shape {tuple(whole.shape)} is split over {self.mesh.size()} processes, and "
                f"{lines.shape[axis]} of its lines are here: no DTensor is split so; gracile.optim.full_state saves it"
            )
        return DTensor.from_local(
            lines, self.mesh, [Shard(axis)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _held(self, key: str, value: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if isinstance(value, DTensor):
            axis = self.axes[key]
            value = value.redistribute(placements=[Replicate() if axis is None else Shard(axis)]).to_local()
        part = torch.empty_like(self.own[key], dtype=value.dtype, device=value.device)  # its strides: BLAS sees them
        return part.copy_(value.reshape(part.shape))

    def _is_whole(self, key: str, value: Any) -> bool:
        if key not in self.axes:
            return False
        return hasattr(value, "device_mesh") or (self.axes[key] is None and getattr(value, "ndim", 0) > 1)


def _as_lines(own: Tensor, whole: Tensor) -> Tensor:
    """``own`` with the dimensions of ``whole``: moments by element are held flat."""
    if own.dim() == whole.dim():
        return own
    line = math.prod(whole.shape[1:])
    return own.view(own.numel() // max(1, line), *whole.shape[1:])


def _cut_axis(last: Tensor, whole: Tensor) -> int | None:
    pairs = enumerate(zip(_as_lines(last, whole).shape, whole.shape, strict=True))
    return next((axis for axis, (part, all_) in pairs if part != all_), None)


def _is_wide(saved: Mapping[str, Any], key: str) -> bool:
    """Whether ``saved`` has the moment ``key`` as numbers, not as codes."""
    value = saved.get(key)
    return key + SCALES not in saved and isinstance(value, Tensor) and value.is_floating_point()
