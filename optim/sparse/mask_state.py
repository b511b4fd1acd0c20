"""How masks and what is packed by them are held: by place, and in their portable form laid out as the parameter.

A mask is held as ``indices`` (int32), the ascending places of its weights in this process's part; how many of them lie
there changes with the mask. It travels as ``mask`` (uint8), ones and zeros, and moments travel as a dense tensor has
them: where weights lie depends on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..distributed import FullShard
from ..state.spec import Codec, HeldTensor, State, StateSpec

NOWHERE = 2**31 - 1  # in place of a place, in a saved mask that has more room than it needs


@dataclass(frozen=True)
class Packed(Codec):
    """Values of the weights in a mask, one after the other. Empty at first: masks of all matrices are drawn together.

    A whole matrix's are saved with room for the most that a mask of it may have: how many it has now, a fresh optimizer
    does not know.

    Args:
        planned: how many weights of the whole matrix a first mask has.
        room: how many weights of it a mask may have.
    """

    planned: int
    room: int

    def held(self, spec: StateSpec, shard: FullShard) -> list[HeldTensor]:
        share = shard.parameter.numel() / max(1, math.prod(shard.shape))
        count = round(self.planned * share) if shard.host == "meta" else 0
        return [HeldTensor(spec.name, (count,), spec.dtype, spec.kind)]

    def is_held(self, spec: StateSpec, saved: Mapping[str, Any]) -> bool:
        return "indices" in saved

    def accept(self, spec: StateSpec, shard: FullShard, saved: Mapping[str, Any]) -> list[HeldTensor]:
        """As many values as the saved mask has places."""
        (held,) = self.held(spec, shard)
        at = saved.get("indices")
        return [held._replace(shape=(len(at),))] if isinstance(at, Tensor) and at.dim() == 1 else [held]

    def decode(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> Tensor:
        at, values = held["indices"].long(), held[spec.name]
        shape = spec.local_shape(shard)
        return values.new_zeros(math.prod(shape)).index_copy_(0, at, values).view(shape)

    def encode(self, value: Tensor, spec: StateSpec, shard: FullShard, held: State) -> None:
        held[spec.name] = value.reshape(-1)[held["indices"].to(value.device).long()]

    def to_saved(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {spec.name: self._filled(held[spec.name], 0)}

    def from_saved(self, spec: StateSpec, shard: FullShard, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {spec.name: saved[spec.name][: _count(saved)]}

    def _filled(self, values: Tensor, filling: int) -> Tensor:
        missing = self.room - len(values)
        return functional.pad(values, (0, missing), value=filling) if missing > 0 else values


class Indices(Packed):
    """The mask itself."""

    def held(self, spec: StateSpec, shard: FullShard) -> list[HeldTensor]:
        return [own._replace(name="indices", dtype=torch.int32) for own in super().held(spec, shard)]

    def accept(self, spec: StateSpec, shard: FullShard, saved: Mapping[str, Any]) -> list[HeldTensor]:
        at = saved.get("indices")
        at = at[at != NOWHERE] if isinstance(at, Tensor) and at.dim() == 1 else None
        if at is not None and len(at):
            inside = 0 <= int(at.min()) <= int(at.max()) < shard.parameter.numel()
            if not inside:
                raise ValueError(f"the saved mask has places outside of a parameter of shape {shard.shape}")
        return super().accept(spec, shard, saved)

    def decode(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> Tensor:
        at, shape = held["indices"].long(), spec.local_shape(shard)
        return torch.zeros(math.prod(shape), dtype=torch.uint8, device=at.device).index_fill_(0, at, 1).view(shape)

    def encode(self, value: Tensor, spec: StateSpec, shard: FullShard, held: State) -> None:
        held["indices"] = value.reshape(-1).nonzero().view(-1).int()

    def to_saved(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"indices": self._filled(held["indices"], NOWHERE)}

    def from_saved(self, spec: StateSpec, shard: FullShard, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"indices": saved["indices"][: _count(saved)]}


@dataclass(frozen=True)
class Flattened(Codec):
    """Laid out as the parameter, but held flat."""

    def held(self, spec: StateSpec, shard: FullShard) -> list[HeldTensor]:
        return [HeldTensor(spec.name, (shard.parameter.numel(),), spec.dtype, spec.kind)]

    def is_held(self, spec: StateSpec, saved: Mapping[str, Any]) -> bool:
        return "indices" in saved

    def decode(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> Tensor:
        return held[spec.name].view(spec.local_shape(shard))

    def encode(self, value: Tensor, spec: StateSpec, shard: FullShard, held: State) -> None:
        held[spec.name] = value.reshape(-1)


@dataclass(frozen=True)
class Bits(Codec):
    """A mask as a bit an entry, held as ``mask_bits``; it travels as a byte an entry, for engines do not cut matrices
    between bytes of bits."""

    def held(self, spec: StateSpec, shard: FullShard) -> list[HeldTensor]:
        return [HeldTensor("mask_bits", (-(-shard.parameter.numel() // 8),), torch.uint8, spec.kind)]

    def is_held(self, spec: StateSpec, saved: Mapping[str, Any]) -> bool:
        return "mask_bits" in saved

    def piece(
        self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor], begin: int, end: int
    ) -> dict[str, Tensor]:
        return {"mask_bits": held["mask_bits"][begin // 8 : -(-end // 8)]}  # from a byte on

    def decode(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> Tensor:
        return unpacked_bits(held["mask_bits"], spec.local_shape(shard))

    def encode(self, value: Tensor, spec: StateSpec, shard: FullShard, held: State) -> None:
        held["mask_bits"] = packed_bits(value)


def _count(saved: Mapping[str, Tensor]) -> int:
    """How many weights a saved mask has."""
    return int((saved["indices"] != NOWHERE).sum())


def packed_bits(mask: Tensor) -> Tensor:
    """Eight entries of ones and zeros in a byte, the first in its lowest bit (flat, uint8)."""
    entries = functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (entries << _places(mask)).sum(1, dtype=torch.uint8)


def unpacked_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The ones and zeros (uint8) of a mask of ``shape``."""
    entries = (bits.unsqueeze(1) >> _places(bits)).bitwise_and_(1)
    return entries.view(-1)[: math.prod(shape)].view(shape)


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
