"""What an optimizer was given, and what this process holds of it: found in the first step, no engine is asked.

Engines replace parameters: DeepSpeed steps flat tensors that hold parts of many, accelerate swaps parameters for
DTensors after the optimizer was built. The registry remembers the parameters of each group as they were given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import Tensor

from .deepspeed import zero3_flat_tensors, zero_ranges
from .layout import ParamRef, UnsupportedLayout, fsdp_range, full_shape, is_dtensor
from .shard_range import ShardRange

Group = dict[str, Any]
Held = list[tuple[ParamRef, ShardRange]]


class ParamRegistry:
    """The parameters of each group, by the group's number and their ids, and how stepped tensors hold them."""

    def __init__(self) -> None:
        self._refs: dict[int, dict[int, ParamRef]] = {}
        self._ranges: dict[int, Held] = {}  # by id of what is stepped

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self._refs)

    def register(self, group: Group, of_all: Group | None = None) -> None:
        """Remember the parameters of a new group, which gets a ``group_number``: engines drop or reorder groups.
        ``of_all`` has those of all processes, where this one steps some of them."""
        begin = sum(map(len, self._refs.values()))
        number = group["group_number"] = len(self._refs)
        held = (of_all or group)["params"]
        self._refs[number] = {id(p): ParamRef(held, i, begin + i, full_shape(p)) for i, p in enumerate(held)}

    def of_group(self, group: Group) -> list[ParamRef]:
        return list(self._refs[group["group_number"]].values())

    def first_position(self, group: Group) -> int:
        return next(iter(self._refs[group["group_number"]].values())).position

    def find(self, p: Tensor, group: Group) -> ParamRef | None:
        """The parameter ``p`` as it was given in ``group``; None for an engine's flat tensor."""
        own = self._refs[group["group_number"]].get(id(p))
        if own is not None and own.parameter is p:  # ids of what is gone are given away again
            return own
        return None

    def take_over(self, p: Tensor, group: Group, groups: Iterable[Group], with_state: Iterable[Tensor]) -> ParamRef:
        """``p`` of a group whose parameters were replaced by DTensors, in their order: accelerate splits a model
        (FSDP2) after its optimizer was built.

        Raises:
            UnsupportedLayout: where the DTensors are of other shapes, or parameters that are gone had state.
        """
        number, held, given = group["group_number"], group["params"], self.of_group(group)
        if [full_shape(q) for q in held] != [ref.shape for ref in given]:
            raise UnsupportedLayout(
                f"parameters of shapes {[ref.shape for ref in given]} were replaced by DTensors of shapes "
                f"{[full_shape(q) for q in held]}; build the optimizer after the model is split"
            )
        now = {id(q) for other in groups for q in other["params"]}
        if any(id(q) not in now for q in with_state):
            raise UnsupportedLayout(
                "parameters were replaced by DTensors when they had state already; split the model first, then load"
            )
        self._ranges.clear()
        self._refs[number] = {
            id(q): ParamRef(held, i, ref.position, ref.shape)
            for i, (q, ref) in enumerate(zip(held, given, strict=True))
        }
        return self._refs[number][id(p)]

    def ranges(self, p: Tensor, group: Group, own: ParamRef | None) -> Held:
        """Which part of which parameters the stepped tensor ``p`` holds on this process."""
        if id(p) not in self._ranges:
            split = own is not None and is_dtensor(p)
            self._ranges[id(p)] = [(own, fsdp_range(p))] if split and own else zero_ranges(p, self.of_group(group))
        return self._ranges[id(p)]

    def stepped_tensors(self, group: Group) -> list[Tensor]:
        """What ``step`` sees in a group: parameters, or an engine's flat tensors."""
        return group["params"] or zero3_flat_tensors(self.of_group(group))


class PrefixedState(MutableMapping[str, Tensor]):
    """The state of one parameter in the state of a flat tensor that holds several: every key begins with its position.

    ``keys`` are those that the parameter's state can have: the flat tensor's are never searched.
    """

    def __init__(self, held: dict[str, Tensor], position: int, keys: Iterable[str]) -> None:
        self.held, self.prefix, self.known = held, f"{position}.", keys

    def __getitem__(self, key: str) -> Tensor:
        return self.held[self.prefix + key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self.held[self.prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self.held[self.prefix + key]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.prefix + key in self.held

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.known if self.prefix + key in self.held)

    def __len__(self) -> int:
        return sum(1 for _ in self)
