"""State of a parameter that FSDP2 splits, as torch.distributed.checkpoint moves it to more or fewer processes.

``optimizer.state`` holds plain tensors, this process's part of each. ``state_dict`` gives DTensors, which know the
whole: of what is stored in 8 bits or packed, the numbers, for blocks that share a scale do not end where lines do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import FullShard, UnsupportedLayout
from .spec import StateSpec, held_tensors, new_tensor, saved_names


class DTensorState:
    """The state of one parameter, of which this process holds ``shard``, on a mesh of one dimension."""

    def __init__(self, mesh: Any, shard: FullShard, specs: Sequence[StateSpec]) -> None:
        self.mesh, self.shard, self.specs = mesh, shard, specs

    def save(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's state as all processes save it: what is split as DTensors of the whole shape. Collective."""
        return {spec.name: self._saved(spec, spec.codec.decode(spec, self.shard, held)) for spec in self.specs}

    def expected(self, saved: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """What fits in the place of ``saved``: whole shapes of DTensors, this process's of plain tensors."""
        expected: dict[str, tuple[int, ...]] = {}
        for spec in self.specs:
            if spec.codec.is_held(spec, saved):
                expected |= {own.name: own.shape for own in held_tensors([spec], self.shard)}
            else:
                value = saved.get(spec.name)
                whole = hasattr(value, "device_mesh") or spec.split_axis(self.shard) is None
                expected[spec.name] = spec.shape if whole else spec.local_shape(self.shard)
        return expected

    def load(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of ``saved``, which is ``expected``, as ``optimizer.state`` holds it. Collective."""
        state: dict[str, Tensor] = {}
        for spec in self.specs:
            if spec.codec.is_held(spec, saved):
                state |= {own.name: saved[own.name] for own in held_tensors([spec], self.shard)}
            else:
                spec.codec.encode(self._own_part(spec, saved[spec.name]), spec, self.shard, state)
        return state | saved_names(self.specs, self.shard, state)

    def _saved(self, spec: StateSpec, value: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard  # here: only FSDP2 needs it, and importing it takes long

        axis = spec.split_axis(self.shard)
        lines = _as_lines(value, spec).contiguous()  # torch broadcasts states of other strides as other numbers
        if axis is None:
            return lines
        share = -(-spec.shape[axis] // self.mesh.size())
        begin = min(self.mesh.get_local_rank() * share, spec.shape[axis])
        if lines.shape[axis] != min(share, spec.shape[axis] - begin):
            raise UnsupportedLayout(
                f"{spec.name!r} of shape {spec.shape} is split over {self.mesh.size()} processes, and "
                f"{lines.shape[axis]} of its lines are here: no DTensor is split so; gracile.optim.full_state saves it"
            )
        stride = new_tensor(spec.shape, spec.dtype, "meta", spec, empty=True).stride()
        return DTensor.from_local(
            lines, self.mesh, [Shard(axis)], run_check=False, shape=torch.Size(spec.shape), stride=stride
        )

    def _own_part(self, spec: StateSpec, value: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if isinstance(value, DTensor):
            axis = spec.split_axis(self.shard)
            value = value.redistribute(placements=[Replicate() if axis is None else Shard(axis)]).to_local()
        part = spec.new_portable(self.shard, value.device).to(value.dtype)  # its strides: BLAS sees them
        return part.copy_(value.reshape(part.shape))


def _as_lines(own: Tensor, spec: StateSpec) -> Tensor:
    """``own`` with the dimensions of the whole: moments by element are held flat."""
    if own.dim() == len(spec.shape):
        return own
    line = math.prod(spec.shape[1:])
    return own.view(own.numel() // max(1, line), *spec.shape[1:])
