"""What a step is made of: a group's keys, a parameter's state, and one parameter of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..distributed import FullMatrix, FullShard, Workspace
from .projected_gradient import ProjectedGradient

Group = dict[str, Any]
State = MutableMapping[str, Tensor]


class ParamGroup(dict[str, Any]):
    """A group of an optimizer, without those of its ``later_keys`` that have the values from before there were such
    keys. They read as these, and come into a checkpoint where they say something.

    torch.distributed.checkpoint asks a checkpoint for every key that a group holds, and refuses one that has it not.
    """

    later: Mapping[str, Any] = {}  # of what is being unpickled, too

    def __init__(self, group: Group, later: Mapping[str, Any]) -> None:
        super().__init__({key: value for key, value in group.items() if key not in later or value != later[key]})
        self.later = later

    def __missing__(self, key: str) -> Any:
        return self.later[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self.later and value == self.later[key]:
            self.pop(key, None)
        else:
            super().__setitem__(key, value)


class WithClock(MutableMapping[str, Tensor]):
    """A state with another counter in the place of its own; what else is written to it goes into the state."""

    def __init__(self, held: State, step: Tensor) -> None:
        self.held, self.step = held, step

    def __getitem__(self, key: str) -> Tensor:
        return self.step if key == "step" else self.held[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        if key == "step":
            self.step = value
        else:
            self.held[key] = value

    def __delitem__(self, key: str) -> None:
        del self.held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


@dataclass(eq=False, slots=True)
class ParamStep:
    """One parameter of this step: what this process holds of it, its group and its state."""

    shard: FullShard
    group: Group
    state: State
    is_due: bool = False  # for a new subspace, in this step
    counter: Tensor | None = None  # that a graph replays; ``state`` then has what the host knows of it
    usable: Tensor | None = None  # of a subspace found in this step: a flag on the device, whether it is finite
    _grad: Tensor | None = None

    def with_numbers(self) -> ParamStep:
        """As arithmetic sees it: with the counter that a graph replays, if there is one. Takes the gradient along."""
        if self.counter is None:
            return self
        return replace(self, state=WithClock(self.state, self.counter))

    @property
    def matrix(self) -> FullMatrix:
        """The shard of a matrix with a subspace."""
        assert isinstance(self.shard, FullMatrix)
        return self.shard

    @property
    def gathered(self) -> Tensor:
        """The gradient that is kept for ``take_grad``."""
        assert self._grad is not None
        return self._grad

    def gather_grad(self) -> Tensor:
        """The gradient, gathered and kept for ``take_grad``. Collective."""
        self._grad = self._gathered_now()
        return self._grad

    def take_grad(self) -> Tensor:
        """The gradient that was gathered, or gathered now; not kept. Collective, where it was not gathered before."""
        grad = self._gathered_now() if self._grad is None else self._grad
        self._grad = None
        return grad

    def _gathered_now(self) -> Tensor:
        kept = isinstance(self.shard.held_gradient, ProjectedGradient)  # of lines that were gathered then
        return self.shard.gradient if kept else self.shard.gather_grad()


@dataclass
class OpenStep:
    """A step of which some parameters have moved, and that is not at its end."""

    workspace: Workspace
    groups: dict[Tensor, tuple[Group, Group]]  # of each parameter: its own, and with its numbers as a step reads them
    moved: dict[Tensor, list[ParamStep]]
