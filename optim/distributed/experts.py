"""The experts of a layer in one tensor (E, m, n): E matrices, each with a subspace of its own.

whole             E views, each a matrix as any other
split             (FSDP2 by whole experts, ZeRO anywhere) an expert that lies on one process is that process's alone:
                  its subspace, its moments and its step are found there, and nothing is sent. One that a boundary
                  cuts is split as any matrix is, and all processes take part.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from .full import FullMatrix, FullShard
from .matrix import MatrixShard
from .process_group import ProcessGroup
from .projection import ProjectionSide
from .shard_range import ShardRange
from .workspace import Workspace

APART = 1_000_003  # between the positions of neighbouring experts: more than a model has parameters


class Expert(FullMatrix):
    """All of one expert: a view of the tensor and of its gradient.

    ``alone``: other processes hold nothing of it and do nothing for it.
    """

    born_stacked = True

    def __init__(
        self,
        parameter: Tensor,
        gradient: Tensor | None,
        position: int,
        workspace: Workspace,
        side: ProjectionSide,
        alone: bool,
    ) -> None:
        super().__init__(parameter, position, workspace, side)
        self._gradient, self.alone = gradient, alone

    @property
    def held_gradient(self) -> Tensor | None:
        return self._gradient

    def let_gradient_go(self) -> None:
        self._gradient = None

    @property
    def processes(self) -> ProcessGroup:
        return ProcessGroup.alone() if self.alone else super().processes


class Experts(FullShard):
    """What this process holds of a tensor (E, m, n): ``parts``, in the order of the experts.

    Args:
        parameter, gradient: (E, m, n); or flat, this process's part of them, where there is a ``held``.
        side: of one expert.
        held: which part this process holds, where the tensor is split.
        shard_basis: of experts that are cut, as for ``MatrixShard``.
    """

    def __init__(
        self,
        parameter: Tensor,
        gradient: Tensor | None,
        position: int,
        workspace: Workspace,
        side: ProjectionSide,
        held: ShardRange | None = None,
        shard_basis: bool | None = False,
    ) -> None:
        super().__init__(parameter, position, workspace)
        self.side, self.held, self._given, self.shard_basis = side, held, gradient, shard_basis
        self.split = held is not None
        self.shape = tuple(parameter.shape) if held is None else held.shape

    @property
    def held_gradient(self) -> Tensor | None:
        return super().held_gradient if self._given is None else self._given

    def let_gradient_go(self) -> None:
        self._given = None

    @property
    def first_element(self) -> int:
        return 0 if self.held is None else self.held.start

    @property
    def processes(self) -> ProcessGroup:
        return super().processes if self.held is None else self.held.processes

    @cached_property
    def bounds(self) -> list[tuple[int, ...]]:
        """Of each expert, which of its elements are which process's, as in a ``ShardRange``."""
        assert self.held is not None
        size = self.shape[1] * self.shape[2]
        return [tuple(min(max(b - e * size, 0), size) for b in self.held.bounds) for e in range(self.shape[0])]

    def owner(self, expert: int) -> int | None:
        """The process on which a split expert lies; None where it is cut."""
        bounds = self.bounds[expert]
        holders = [i for i, (a, b) in enumerate(pairwise(bounds)) if b > a]
        return holders[0] if len(holders) == 1 else None

    @property
    def alike(self) -> bool:
        """Whether each expert lies here entirely or not at all, wherever boundaries are."""
        return self.held is None or self.held.chunked

    def like(self) -> FullMatrix:
        """An expert without its memory, for shapes alone."""
        weights = torch.empty(self.shape[1:], dtype=self.dtype, device="meta")
        return FullMatrix(weights, self.position, Workspace(), self.side)

    @property
    def parts(self) -> list[tuple[int, FullMatrix]]:
        """Each expert of which this process holds something, or must take part in what is done to it, by its number."""
        gradient = self.held_gradient
        if self.held is None:
            grads = [None] * self.shape[0] if gradient is None else gradient.unbind()
            each = enumerate(zip(self.parameter.detach().unbind(), grads, strict=True))
            found: list[tuple[int, FullMatrix]] = [(e, self._whole(e, W, G, alone=False)) for e, (W, G) in each]
        else:
            made = ((e, self._part(e, self.held, gradient)) for e in range(self.shape[0]))
            found = [(e, part) for e, part in made if part is not None]
        for _, part in found:
            part.maximize = self.maximize
        return found

    def _whole(self, e: int, W: Tensor, gradient: Tensor | None, alone: bool) -> Expert:
        return Expert(W, gradient, self.position + e * APART, self.workspace, self.side, alone)

    def _part(self, e: int, held: ShardRange, gradient: Tensor | None) -> FullMatrix | None:
        bounds, owner, index = self.bounds[e], self.owner(e), held.processes.index
        if owner is not None and owner != index:
            return None
        (m, n), size = self.side.shape, bounds[index + 1] - bounds[index]
        begin = max(0, e * m * n - held.start) if size else 0
        W = self.parameter.narrow(0, begin, size)
        G = W if gradient is None else gradient.narrow(0, begin, size)
        if owner is not None:
            return self._whole(e, W.view(m, n), G.view(m, n), alone=True)
        own = replace(held, shape=(m, n), bounds=bounds, offset=0, chunked=False)
        return MatrixShard(W, G, own, self.position + e * APART, self.workspace, self.side, self.shard_basis)
