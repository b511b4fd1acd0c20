"""What a tensor of state is, declared once.

A method lists its tensors as ``StateSpec``s of the whole parameter. From the list follow: the tensors that a process
makes at the first step, the bytes that a plan counts, what fits at loading, DTensors under FSDP2, whole tensors between
layouts, storage in 8 bits, and the kinds of the memory table.

A spec says how its tensor is split where its parameter is (``Placement``) and how a process stores it (``Codec``). What
a process would hold without a codec is the tensor's PORTABLE form: it can be put together with what other processes
hold. A codec makes of it the tensors that are HELD in ``optimizer.state``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import Experts, FlatShard, FullMatrix, FullShard, MatrixShard

State = MutableMapping[str, Tensor]

# Kinds, the columns of the memory table.
MOMENTS, PROJECTORS, ERRORS, INDICES = "moments", "projectors", "error buffers", "indices"


class Placement(Enum):
    """How a tensor of state is split where its parameter is."""

    REPLICATED = "each process holds all of it"
    LINES = "one dimension counts the matrix's lines; each process holds those that it works on"
    ELEMENTS = "laid out as the parameter, and cut where it is"
    BASIS = "rows of a basis: each process holds all of them, or its share"


class HeldTensor(NamedTuple):
    """One tensor in ``optimizer.state``: by shape and dtype, before it exists."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    on_host: bool = False  # on the CPU, so that reading it never stops a device

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Codec:
    """How a process holds a tensor of state. This one holds it as it is.

    ``encode`` and ``decode`` are collective where a codec says so.
    """

    def held(self, spec: StateSpec, shard: FullShard) -> list[HeldTensor]:
        return [HeldTensor(spec.name, spec.local_shape(shard), spec.dtype, spec.kind, spec.on_host)]

    def new(self, spec: StateSpec, shard: FullShard) -> dict[str, Tensor]:
        """The tensors of ``held``, made, with ``spec.fill`` in them."""
        return {
            own.name: new_tensor(own.shape, own.dtype, shard.host if own.on_host else shard.device, spec)
            for own in self.held(spec, shard)
        }

    def decode(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> Tensor:
        """The portable form of what is held."""
        return held[spec.name]

    def encode(self, value: Tensor, spec: StateSpec, shard: FullShard, held: State) -> None:
        """Write a portable value into the state that holds it."""
        held[spec.name] = value

    def piece(
        self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor], begin: int, end: int
    ) -> dict[str, Tensor]:
        """Of what is held of a tensor laid out as the parameter, that of the elements from ``begin`` to ``end`` of
        ``shard.parameter``: views."""
        return {spec.name: held[spec.name].view(-1)[begin:end]}

    def is_held(self, spec: StateSpec, saved: Mapping[str, Any]) -> bool:
        """Whether ``saved`` has the tensors of ``held`` and not the portable form, where these differ."""
        return False

    def accept(self, spec: StateSpec, shard: FullShard, saved: Mapping[str, Any]) -> list[HeldTensor]:
        """What would fit in the place of ``saved``, which has all keys of ``held``: ``held``, but where a codec's
        tensors have no shape of their own."""
        return self.held(spec, shard)

    def to_saved(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is saved in place of tensors of a whole parameter's ``held``, as torch.distributed.checkpoint needs it:
        in shapes that a fresh optimizer knows, for it reads into the tensors of one, and contiguous, for it sends
        tensors as they lie in memory."""
        return {spec.name: held[spec.name].contiguous()} if spec.column_major else {}

    def from_saved(self, spec: StateSpec, shard: FullShard, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of ``to_saved``, also of what was saved as it is held."""
        if not spec.column_major:
            return {}
        value = saved[spec.name]
        return {spec.name: new_tensor(spec.shape, value.dtype, value.device, spec, empty=True).copy_(value)}


PLAIN = Codec()


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a parameter's state.

    Args:
        name: its key, permanent.
        shape: of all of it, for the whole parameter.
        dtype: of its portable form.
        placement: how it is split.
        axis: of ``LINES``, the dimension that counts lines.
        kind: what it is for.
        on_host: kept on the CPU.
        fill: the number it is born with.
        column_major: stored one column after the other, where it is not split.
        codec: how a process holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    placement: Placement = Placement.REPLICATED
    axis: int = 0
    kind: str = MOMENTS
    on_host: bool = False
    fill: float = 0
    column_major: bool = False
    codec: Codec = PLAIN

    def local_shape(self, shard: FullShard) -> tuple[int, ...]:
        """The shape of its portable form on this process."""
        if self.placement is Placement.ELEMENTS:
            return tuple(shard.parameter.shape)
        if not isinstance(shard, MatrixShard):
            return self.shape
        if self.placement is Placement.LINES:
            first, last = shard.lines
            return (*self.shape[: self.axis], last - first, *self.shape[self.axis + 1 :])
        if self.placement is Placement.BASIS and shard.shard_basis:
            share = shard.processes.share(self.shape[0])
            return (share.stop - share.start, *self.shape[1:])
        return self.shape

    def split_axis(self, shard: FullShard) -> int | None:
        """The dimension in which its portable form is split over processes; None where each holds all of it."""
        if not shard.split or self.placement is Placement.REPLICATED:
            return None
        if self.placement is Placement.ELEMENTS:
            return 0
        if self.placement is Placement.LINES:
            return self.axis
        return 0 if isinstance(shard, MatrixShard) and shard.shard_basis else None

    def portable(self, shard: FullShard) -> HeldTensor:
        """Its portable form on this process."""
        return HeldTensor(self.name, self.local_shape(shard), self.dtype, self.kind, self.on_host)

    def new_portable(self, shard: FullShard, device: torch.device | str) -> Tensor:
        """An empty portable tensor of this process, with the strides that it is born with."""
        return new_tensor(self.local_shape(shard), self.dtype, device, self, empty=True)

    def stored_by(self, codec: Codec) -> StateSpec:
        return replace(self, codec=codec)


@dataclass(frozen=True)
class Coordinates:
    """What an update rule sees of a parameter: the shape of all of it, and how it is split."""

    shape: tuple[int, ...]
    placement: Placement
    axis: int = 0

    @classmethod
    def of(cls, shard: FullShard, in_rows: bool = False) -> Coordinates:
        """Of a matrix with a subspace, its r coordinates a line; of other parameters, their elements, or, with
        ``in_rows``, whole rows of them."""
        if isinstance(shard, FullMatrix) and shard.ranked:
            return cls(shard.side.projected_shape, Placement.LINES, shard.side.line_axis)
        if in_rows and len(shard.shape) > 1:
            return cls(shard.shape, Placement.LINES, 0)
        return cls(shard.shape, Placement.ELEMENTS)

    def spec(self, name: str, dtype: torch.dtype) -> StateSpec:
        """A moment of this shape."""
        return StateSpec(name, self.shape, dtype, self.placement, self.axis)

    def sum_over(self, dim: int, name: str, dtype: torch.dtype) -> StateSpec:
        """A moment that is a sum over dimension ``dim``, counted from the end."""
        dim %= len(self.shape)
        shape = self.shape[:dim] + self.shape[dim + 1 :]
        if self.placement is not Placement.LINES or dim == self.axis:
            return StateSpec(name, shape, dtype)
        return StateSpec(name, shape, dtype, Placement.LINES, self.axis - (dim < self.axis))


def step_spec(group: Mapping[str, Any]) -> StateSpec:
    """How often a parameter has moved: every parameter has it. On the device where a graph counts it."""
    return StateSpec("step", (), torch.float32, on_host=not group.get("capturable", False))


def basis_spec(shard: FullMatrix, dtype: torch.dtype | None = None, name: str = "basis") -> StateSpec:
    """P, r columns of one side. Left columns are stored one after the other, as LAPACK leaves them."""
    side = shard.side
    return StateSpec(
        name, side.basis_shape, dtype or shard.dtype, Placement.BASIS, kind=PROJECTORS, column_major=not side.right
    )


def moment_dtype(shard: FullShard, group: Mapping[str, Any]) -> torch.dtype:
    """Moments are fp32 at least, also for bf16 parameters, unless the group says otherwise: with b2 = 0.999 a bf16
    second moment cannot take up increments of a tenth of a percent."""
    chosen: torch.dtype | None = group.get("state_dtype")
    return chosen or wide_dtype(shard)


def wide_dtype(shard: FullShard) -> torch.dtype:
    """The parameter's dtype, fp32 at least: for single numbers and what must not drift."""
    return torch.promote_types(shard.dtype, torch.float32)


# ---- from declarations to tensors ------------------------------------------------------------------------------------


def new_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, spec: StateSpec, empty: bool = False
) -> Tensor:
    columns = by_columns(shape, spec)
    made = torch.empty(shape[::-1] if columns else shape, dtype=dtype, device=device)
    if not empty:
        made.fill_(spec.fill)
    return made.t() if columns else made


def by_columns(shape: tuple[int, ...], spec: StateSpec) -> bool:
    """Whether a tensor of this shape, all of what ``spec`` declares or a part, is stored one column after the other."""
    return spec.column_major and shape == spec.shape and len(shape) == 2


def new_state(specs: Iterable[StateSpec], shard: FullShard) -> dict[str, Tensor]:
    """The tensors that this process holds, made."""
    specs = list(specs)
    state = {key: value for spec in specs for key, value in spec.codec.new(spec, shard).items()}
    return state | saved_names(specs, shard, state)


def to_saved(specs: Iterable[StateSpec], shard: FullShard, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a whole parameter as it is saved."""
    other = {key: value for spec in specs for key, value in spec.codec.to_saved(spec, shard, held).items()}
    return {**held, **other}


def from_saved(specs: Iterable[StateSpec], shard: FullShard, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_saved``."""
    other = {key: value for spec in specs for key, value in spec.codec.from_saved(spec, shard, saved).items()}
    return {**saved, **other}


def held_tensors(specs: Iterable[StateSpec], shard: FullShard) -> list[HeldTensor]:
    """The tensors that this process holds, before they exist."""
    return [own for spec in specs for own in spec.codec.held(spec, shard)]


def to_portable(specs: Iterable[StateSpec], shard: FullShard, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process holds, as it travels to another layout. Collective where a codec is."""
    return {spec.name: spec.codec.decode(spec, shard, held) for spec in specs}


def portable_from(specs: Iterable[StateSpec], shard: FullShard, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The portable form of what was saved in that form or as a process held it. Collective where a codec is."""
    specs = list(specs)
    encoded = [spec for spec in specs if spec.codec.is_held(spec, saved)]
    held = from_saved(encoded, shard, saved)
    portable = {spec.name: held[spec.name] for spec in specs if spec not in encoded and spec.name in held}
    return portable | to_portable(encoded, shard, held)


def from_portable(specs: Sequence[StateSpec], shard: FullShard, portable: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_portable``. Collective where a codec is."""
    held: dict[str, Tensor] = {}
    for spec in specs:
        spec.codec.encode(portable[spec.name], spec, shard, held)
    return held | saved_names(specs, shard, held)


def saved_names(specs: Iterable[StateSpec], shard: FullShard, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where FSDP2 splits a parameter, whose state is saved in its portable form: an empty tensor for each name that
    nothing of what is held has. torch.distributed.checkpoint looks for what was saved by the names of what is held."""
    held_range = shard.held if isinstance(shard, (FlatShard, MatrixShard, Experts)) else None
    if held_range is None or not held_range.chunked:
        return {}
    return {spec.name: torch.empty(0, dtype=spec.dtype, device=shard.device) for spec in specs if spec.name not in held}
