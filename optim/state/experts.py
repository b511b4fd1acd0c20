"""State of a tensor of experts (E, m, n): what each expert declares, kept in one tensor for each key.

whole, FSDP2      (experts here, *shape of one): ``step`` apart, an expert's tensor is a view, the e-th
ZeRO              flat, what this process holds of each expert one after the other, for parts differ in shape
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import Experts, FullMatrix, FullShard
from .spec import Codec, HeldTensor, State, StateSpec, by_columns

Declare = Callable[[FullMatrix], Sequence[StateSpec]]


class View(NamedTuple):
    """Where an expert's tensor lies in the one of all."""

    begin: int
    shape: tuple[int, ...]
    columns: bool  # one column after the other

    def of(self, flat: Tensor) -> Tensor:
        own = flat.narrow(0, self.begin, math.prod(self.shape))
        return own.view(*self.shape[:-2], *self.shape[:-3:-1]).mT if self.columns else own.view(self.shape)


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec(StateSpec):
    """A tensor of state of each expert: ``one`` of any, ``each`` of those that this process holds something of."""

    one: StateSpec
    each: tuple[StateSpec, ...] = ()

    def local_shape(self, shard: FullShard) -> tuple[int, ...]:
        return (len(self.each), *self.one.shape)

    def split_axis(self, shard: FullShard) -> int | None:
        return 0 if shard.split else None


def specs_of_experts(shard: Experts, declare: Declare) -> list[StateSpec]:
    """What ``declare`` says of one matrix, for all of them."""
    each = list(zip(*(declare(part) for _, part in shard.parts), strict=True))
    found: list[StateSpec] = []
    for number, one in enumerate(declare(shard.like())):
        own = tuple(each[number]) if each else ()
        stacked = ExpertsSpec(
            name=one.name,
            shape=(shard.shape[0], *one.shape),
            dtype=one.dtype,
            kind=one.kind,
            on_host=one.on_host,
            column_major=one.column_major,
            codec=OF_EXPERTS,
            one=one,
            each=own,
        )
        found.append(stacked)
    return found


class ExpertsCodec(Codec):
    """Each expert's tensor by its own codec, all of them in one."""

    def held(self, spec: StateSpec, shard: FullShard) -> list[HeldTensor]:
        return [held for held, _ in _placed(spec, shard)]

    def new(self, spec: StateSpec, shard: FullShard) -> dict[str, Tensor]:
        own, experts = _of_experts(spec, shard)
        placed = _placed(spec, shard)
        made = {held.name: _empty(held, views, shard) for held, views in placed}
        for i, (one, (_, part)) in enumerate(zip(own.each, experts.parts, strict=True)):
            fresh = one.codec.new(one, part)
            for held, views in placed:
                views[i].of(flat(made[held.name])).copy_(fresh[held.name])
        return made

    def decode(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> Tensor:
        """Of experts that each lie here entirely."""
        each = self.decode_each(spec, shard, held)
        return (
            torch.stack(each) if each else torch.empty(spec.local_shape(shard), dtype=spec.dtype, device=shard.device)
        )

    def decode_each(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> list[Tensor]:
        """The portable form of each expert's. Collective where its codec is."""
        own, experts = _of_experts(spec, shard)
        parts = zip(own.each, experts.parts, _views(spec, shard, dict(held)), strict=True)
        return [one.codec.decode(one, part, state) for one, (_, part), state in parts]

    def encode(self, value: Tensor | Sequence[Tensor], spec: StateSpec, shard: FullShard, held: State) -> None:
        """``value`` is one portable tensor for each expert, stacked or not."""
        if not all(own.name in held for own in self.held(spec, shard)):
            held.update(self.new(spec, shard))
        own, experts = _of_experts(spec, shard)
        views = _views(spec, shard, held)
        for one, (_, part), state, its in zip(own.each, experts.parts, views, value, strict=True):
            one.codec.encode(its, one, part, state)

    def is_held(self, spec: StateSpec, saved: Mapping[str, Any]) -> bool:
        own, _ = _of_experts(spec)
        return own.one.codec.is_held(own.one, saved)

    def from_saved(self, spec: StateSpec, shard: FullShard, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not spec.column_major:
            return {}
        ((held, views),) = _placed(spec, shard)
        value = saved[spec.name]
        made = _empty(held._replace(dtype=value.dtype), views, shard, value.device)
        return {spec.name: made.copy_(value)}


OF_EXPERTS = ExpertsCodec()


class ExpertStates:
    """How a process's tensors of one parameter hold those of its experts: found once."""

    def __init__(self, shard: Experts, specs: Sequence[StateSpec]) -> None:
        placed = [own for spec in specs if isinstance(spec, ExpertsSpec) for own in _placed(spec, shard)]
        self.views = {held.name: views for held, views in placed}
        self.alike, self.count = shard.alike, max(map(len, self.views.values()), default=0)

    def states_of(self, held: State) -> list[ExpertState]:
        """The state of each expert, in their order."""
        if not self.count:
            return []
        each = [self._each(held[key], views) for key, views in self.views.items()]
        return [ExpertState(held, dict(zip(self.views, own, strict=True))) for own in zip(*each, strict=True)]

    def _each(self, tensor: Tensor, views: Sequence[View]) -> Sequence[Tensor]:
        return tensor.unbind() if self.alike else [view.of(flat(tensor)) for view in views]


class ExpertState(MutableMapping[str, Tensor]):
    """The state of one expert, views of what ``held`` has of all. What is written goes into the tensor of all; each
    counts its steps itself, and what one has counted is what the parameter has."""

    def __init__(self, held: State, views: dict[str, Tensor]) -> None:
        self.held = held
        self.views = {"step": held["step"].clone(), **views} if "step" in held else views

    def __getitem__(self, key: str) -> Tensor:
        return self.views[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        own = self.views[key]
        if own is not value:
            own.copy_(value)
        if key == "step":
            self.held["step"].copy_(value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{key!r} is of all experts; one cannot be without it")

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)


def flat(tensor: Tensor) -> Tensor:
    """All numbers of a tensor of all experts, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _of_experts(spec: StateSpec, shard: FullShard | None = None) -> tuple[ExpertsSpec, Experts]:
    assert isinstance(spec, ExpertsSpec)
    assert shard is None or isinstance(shard, Experts)
    return spec, shard  # type: ignore[return-value]  # asked for only where it is given


def _views(spec: StateSpec, shard: FullShard, held: State) -> list[ExpertState]:
    return ExpertStates(_of_experts(spec, shard)[1], [spec]).states_of(held)


def _placed(spec: StateSpec, shard: FullShard) -> list[tuple[HeldTensor, list[View]]]:
    """The tensors that hold those of each expert, and where."""
    own, experts = _of_experts(spec, shard)
    templates = own.one.codec.held(own.one, experts.like())
    each = [one.codec.held(one, part) for one, (_, part) in zip(own.each, experts.parts, strict=True)]
    found = []
    for number, template in enumerate(templates):
        views, begin = [], 0
        for tensors in each:
            shape = tensors[number].shape
            views.append(View(begin, shape, by_columns(shape, own.one)))
            begin += math.prod(shape)
        shape = (len(each), *template.shape) if experts.alike else (begin,)
        found.append((template._replace(shape=shape), views))
    return found


def _empty(held: HeldTensor, views: Sequence[View], shard: FullShard, device: torch.device | None = None) -> Tensor:
    where = device or (shard.host if held.on_host else shard.device)
    made = torch.empty(math.prod(held.shape), dtype=held.dtype, device=where)
    if views and views[0].columns and len(held.shape) > 1:
        return made.view(*held.shape[:-2], *held.shape[:-3:-1]).mT
    return made.view(held.shape)
