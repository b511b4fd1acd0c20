"""Optimizers that do something to whole layers at times: they find the layers by the parameters they are given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...layer_registry import Part, parts_among
from ..core.clock import steps_of
from ..core.optimizer import ShardedOptimizer
from ..core.rules import TORCH_ADAM
from ..core.types import Group, ParamStep
from ..distributed import FullShard, ProcessGroup, UnsupportedLayout, held_shard

Parts = dict[str, Tensor]  # a layer's parameters and buffers by their own names, each whole


class LayerStep(NamedTuple):
    """One layer of this step, and what was stepped of it by the parameters' names."""

    layer: Any
    stepped: dict[str, ParamStep]

    @property
    def group(self) -> Group:
        return next(iter(self.stepped.values())).group

    @property
    def steps(self) -> int:
        """How often this layer has moved."""
        return steps_of(next(iter(self.stepped.values())).state)

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
        with self._taken(
            shards, {name: shard.gather_whole(shard.parameter) for name, shard in shards.items()}
        ) as parts:
            yield parts

    def whole_at(self, owner: int) -> Parts:
        """``whole`` for one process: of what is split, the others have nothing. Collective."""
        found = {name: shard.gather_whole_at(shard.parameter, owner) for name, shard in self.shards().items()}
        return {name: part for name, part in found.items() if part is not None}

    @contextmanager
    def whole_from(self, owner: int, found: Parts, processes: ProcessGroup) -> Iterator[Parts]:
        """``whole``, as it has become at the one process that had it. Collective."""
        shards = self.shards()
        parts = {
            name: shard.broadcast_whole(shard.parameter, found.get(name), owner, processes)
            for name, shard in shards.items()
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
    """AdamW, as torch has it, for models with layers of one method; ``after_layers`` is where it cares for them.

    ``method`` is what the layers name as theirs, ``layer_class`` what a user is told to put into the model, ``stepped``
    the names of those of a layer's parameters that the method needs together. A group has no rank.
    """

    rule = TORCH_ADAM
    method: ClassVar[str]
    layer_class: ClassVar[str]
    stepped: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: ParamsT, arguments: Group) -> None:
        self._parts: dict[int, Part] = {}  # by position
        super().__init__(params, arguments)
        on_meta = all(p.is_meta for group in self.param_groups for p in group["params"])
        if not on_meta:  # planning asks for parameters without their layers
            self._require_layers()

    def register(self, group: Group) -> None:
        super().register(group)
        self.__dict__.setdefault("_parts", {})  # unpickled
        self._find_layers(group)

    def _find_layers(self, group: Group) -> None:
        refs = self.registry.of_group(group)
        found = parts_among(ref.parameter for ref in refs)
        for ref in refs:
            part = found.get(id(ref.parameter))
            if part is not None and getattr(part.layer, "method", None) == self.method:
                self._parts[ref.position] = part

    def _require_layers(self) -> None:
        if not self._parts:
            raise ValueError(
                f"{type(self).__name__} found no {self.layer_class} by the parameters it was given; put such layers "
                f"into the model first: gracile.models.convert.convert(model, {self.layer_class}, ...)"
            )

    def part_of(self, shard: FullShard) -> str | None:
        """The name of a parameter in its layer, if the method needs it."""
        if not self._parts:  # unpickled before the model was
            for group in self.param_groups:
                self._find_layers(group)
            self._require_layers()
        part = self._parts.get(shard.position)
        return part.name if part is not None and part.name in self.stepped else None

    def moves_by_element(self, shard: FullShard, group: Group) -> bool:
        return super().moves_by_element(shard, group) and self.part_of(shard) is None

    def moves_by_direction(self, shard: FullShard, group: Group) -> bool:
        return True

    def after_step(self, work: list[ParamStep]) -> None:
        found: dict[int, LayerStep] = {}
        for item in work:
            if self.part_of(item.shard) is not None:
                part = self._parts[item.shard.position]
                found.setdefault(id(part.layer), LayerStep(part.layer, {})).stepped[part.name] = item
        for layer in found.values():
            missing = set(self.stepped) - set(layer.stepped)
            if missing:
                raise UnsupportedLayout(
                    f"{type(self).__name__} must step {', '.join(self.stepped)} of a {self.layer_class} together, but "
                    f"{', '.join(sorted(missing))} of {layer.layer} is elsewhere; put them into one parameter group, "
                    "leave none of them frozen, and under ZeRO 3 raise sub_group_size"
                )
        if found:
            self.after_layers(list(found.values()))

    def after_layers(self, layers: list[LayerStep]) -> None:
        """Called once a step with all layers that moved, in the same order on every process."""
