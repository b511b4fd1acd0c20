"""Optimizers that do something to whole layers at times: they find the layers by the parameters they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...layer_registry import Part, parts_among
from ..core.optimizer import Group, ParamStep, ShardedOptimizer, State
from ..core.rules import TORCH_ADAM
from ..distributed import FullShard, ProcessGroup, UnsupportedLayout, held_shard

Parts = dict[str, Tensor]  # a layer's parameters and buffers by their own names, each whole


class LayerWork(NamedTuple):
    """One layer of this step, and what was stepped of it by the parameters' names."""

    layer: Any
    stepped: dict[str, ParamStep]

    @property
    def group(self) -> Group:
        return next(iter(self.stepped.values())).group

    @property
    def steps(self) -> int:
        """How often this layer has moved."""
        return int(next(iter(self.stepped.values())).state["step"].item())

    @property
    def position(self) -> int:
        """Among all parameters of the optimizer: the same on every process and in every layout."""
        return min(work.shard.position for work in self.stepped.values())

    def shards(self) -> dict[str, FullShard]:
        """What this process holds of the layer's parameters: of those that were stepped, and of the frozen ones."""
        found = {name: work.shard for name, work in self.stepped.items()}
        for name, parameter in self.layer.named_parameters(recurse=False):
            if name not in found and not parameter.requires_grad:
                found[name] = held_shard(parameter)
        return found

    @contextmanager
    def whole(self) -> Iterator[Parts]:
        """The layer's parameters and buffers, each whole and as wide as the optimizer keeps it, to be written to.

        Collective where an engine splits parameters: then they are put together, and each process takes its part.
        """
        shards = self.shards()
        with self._taken(shards, {name: shard.whole_of(shard.parameter) for name, shard in shards.items()}) as parts:
            yield parts

    def whole_at(self, owner: int) -> Parts:
        """``whole`` for one process: of what is split, the others have nothing. Collective."""
        found = {name: shard.whole_at(shard.parameter, owner) for name, shard in self.shards().items()}
        return {name: part for name, part in found.items() if part is not None}

    @contextmanager
    def whole_from(self, owner: int, found: Parts, world: ProcessGroup) -> Iterator[Parts]:
        """``whole``, as it has become at the one process that had it. Collective."""
        shards = self.shards()
        parts = {
            name: shard.whole_from(shard.parameter, found.get(name), owner, world) for name, shard in shards.items()
        }
        with self._taken(shards, parts) as taken:
            yield taken

    @contextmanager
    def _taken(self, shards: dict[str, FullShard], parts: Parts) -> Iterator[Parts]:
        yield dict(self.layer.named_buffers(recurse=False)) | parts
        for name, shard in shards.items():
            if shard.split:
                shard.parameter.copy_(shard.part_of(parts[name]))


class FactoredOptimizer(ShardedOptimizer):
    """AdamW, as torch has it, for models with layers of one class; ``settle`` is where a method cares for them.

    ``needs`` is the name of the layers' class, ``stepped`` the names of those of its parameters that a method needs
    together. A group has no rank.
    """

    rule = TORCH_ADAM
    needs: str
    stepped: tuple[str, ...] = ()

    def __init__(self, params: ParamsT, arguments: Group) -> None:
        self._parts: dict[int, Part] = {}  # by position
        super().__init__(params, arguments)
        self._require_layers()

    def _register(self, group: Group) -> None:
        super()._register(group)
        self.__dict__.setdefault("_parts", {})  # unpickled
        self._find(group)

    def _find(self, group: Group) -> None:
        members = self._members[group["group_number"]].values()
        found = parts_among(member.parameter for member in members)
        for member in members:
            part = found.get(id(member.parameter))
            if part is not None and self.needs in (kind.__name__ for kind in type(part.layer).__mro__):
                self._parts[member.position] = part

    def _require_layers(self) -> None:
        if not self._parts:
            raise ValueError(
                f"{type(self).__name__} found no {self.needs} by the parameters it was given; put such layers into the "
                f"model first: gracile.models.convert.convert(model, {self.needs}, ...)"
            )

    @classmethod
    def on_paper(cls, parameter: Tensor, keys: dict[str, Any]) -> ShardedOptimizer:
        """A parameter alone has no layer."""
        loose: Any = type(cls.__name__, (cls,), {"_require_layers": lambda self: None})
        built: ShardedOptimizer = loose([parameter], **keys)
        return built

    def part_of(self, shard: FullShard) -> str | None:
        """The name of a parameter in its layer, if the method needs it."""
        if not self._parts:  # unpickled before the model was
            for group in self.param_groups:
                self._find(group)
            self._require_layers()
        part = self._parts.get(shard.position)
        return part.name if part is not None and part.name in self.stepped else None

    def settle(self, work: list[ParamStep]) -> None:
        found: dict[int, LayerWork] = {}
        for item in work:
            if self.part_of(item.shard) is not None:
                part = self._parts[item.shard.position]
                found.setdefault(id(part.layer), LayerWork(part.layer, {})).stepped[part.name] = item
        for layer in found.values():
            missing = set(self.stepped) - set(layer.stepped)
            if missing:
                raise UnsupportedLayout(
                    f"{type(self).__name__} must step {', '.join(self.stepped)} of a {self.needs} together, but "
                    f"{', '.join(sorted(missing))} of {layer.layer} is elsewhere; put them into one parameter group, "
                    "leave none of them frozen, and under ZeRO 3 raise sub_group_size"
                )
        if found:
            self.settle_layers(list(found.values()))

    def settle_layers(self, layers: list[LayerWork]) -> None:
        """Called once a step with all layers that moved, in the same order on every process."""


def since(steps: float, period: int) -> int:
    """Steps since a clock last struck, this one included: 1 to ``period``."""
    return (int(steps) - 1) % period + 1


def at_step(state: State, step: int) -> State:
    """``state`` as a rule sees it whose moments were reset ``step`` steps ago."""
    return {**state, "step": torch.tensor(float(step))}
