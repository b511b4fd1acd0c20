"""What a step is made of: a group's keys, a parameter's state, and one parameter of a step."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..distributed import FullMatrix, FullShard

Group = dict[str, Any]
State = MutableMapping[str, Tensor]


@dataclass(eq=False, slots=True)
class ParamStep:
    """One parameter of this step: what this process holds of it, its group and its state."""

    shard: FullShard
    group: Group
    state: State
    is_due: bool = False  # for a new subspace, in this step
    usable: Tensor | None = None  # of a subspace found in this step: a flag on the device, whether it is finite
    _grad: Tensor | None = None

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
        self._grad = self.shard.gather_grad()
        return self._grad

    def take_grad(self) -> Tensor:
        """The gradient that was gathered, or gathered now; not kept. Collective, where it was not gathered before."""
        grad = self.shard.gather_grad() if self._grad is None else self._grad
        self._grad = None
        return grad
