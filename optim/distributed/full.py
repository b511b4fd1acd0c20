"""A parameter that this process holds entirely: one process, or a replica under DistributedDataParallel.

Methods speak to a shard in its verbs. A matrix comes as its lines: a line is what belongs to one row of coordinates, a
row of the matrix where the right side is projected, a column where the left is. What is one line's business needs no
other process; ``sum_``, ``norm``, ``mean``, ``row_sums`` and ``solve`` are what lines have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .process_group import ProcessGroup
from .projection import LowRankUpdate, ProjectionSide, Workspace


@dataclass(frozen=True)
class Runs:
    """Which elements of a whole tensor, flattened, a process holds: ``count`` runs of ``width`` of them, the first from
    ``begin`` on, each ``stride`` behind the one before; ``whole`` is how many there are on all processes."""

    count: int
    width: int
    begin: int
    stride: int
    whole: int

    def begin_of(self, run: int) -> int:
        return self.begin + run * self.stride


class Solving:
    """Something found from a whole matrix, on one process while others find theirs; then every process gets it."""

    def __init__(
        self,
        find: Callable[[Tensor], Tensor],
        matrix: Tensor | None,
        shared: Callable[[Tensor | None], Tensor],
        wave: int = 1,
    ) -> None:
        self._find, self._matrix, self._shared = find, matrix, shared
        self._found: Tensor | None = None
        self.wave = wave  # how many processes can solve at the same time

    def work(self) -> None:
        """Solve, where this process holds the matrix."""
        if self._matrix is not None:
            self._found, self._matrix = self._find(self._matrix), None

    def result(self) -> Tensor:
        """What was found. Collective: every process asks in the order in which they were begun."""
        self.work()
        return self._shared(self._found)


class FullShard:
    """A tensor of any shape whose moments live in its own coordinates."""

    ranked = False
    split = False  # whether other processes hold parts of it

    def __init__(self, parameter: Tensor, position: int, room: Workspace) -> None:
        self.parameter = parameter
        self.shape = tuple(parameter.shape)
        self.position = position  # among all parameters of the optimizer: the same on every process
        self.room = room

    @property
    def host(self) -> str:
        """Where clocks live: the CPU, or nowhere when only shapes are asked for."""
        return "meta" if self.parameter.device.type == "meta" else "cpu"

    @property
    def grad(self) -> Tensor:
        grad = self.parameter.grad
        assert grad is not None, "only parameters with a gradient are stepped"
        return grad

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        """The shape of what the rule sees."""
        return tuple(self.parameter.shape)

    @property
    def runs(self) -> Runs:
        """Where the coordinates that this process holds lie among all of them."""
        numel = math.prod(self.coordinates_shape)
        return Runs(1, numel, 0, 0, numel)

    def largest_(self, tensor: Tensor) -> Tensor:
        """The largest of each element over all processes, in place."""
        return tensor

    def state_dtype(self, group: dict[str, Any]) -> torch.dtype:
        """Moments are fp32 at least, also for bf16 parameters, unless the group says otherwise: with b2 = 0.999
        a bf16 second moment cannot take up increments of a tenth of a percent."""
        return group.get("state_dtype") or torch.promote_types(self.parameter.dtype, torch.float32)

    def norm(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The Frobenius norm of a tensor laid out as this parameter or its coordinates; a scalar on its device."""
        norm: Tensor = torch.linalg.vector_norm(like, dtype=dtype)
        return norm

    def mean(self, like: Tensor, dim: int) -> Tensor:
        """The mean over one dimension of a tensor laid out as this parameter or its coordinates."""
        return like.mean(dim=dim)

    def rms(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The root mean square of a tensor laid out as this parameter or its coordinates; a scalar on its device."""
        rms: Tensor = self.norm(like, dtype) / math.sqrt(max(1, self.count(like)))
        return rms

    def weight_rms(self) -> Tensor:
        """The root mean square of the weights, in fp32 at least; a scalar on their device."""
        W = self.parameter
        norm = torch.linalg.vector_norm(W, dtype=self._wide)
        rms: Tensor = norm / math.sqrt(max(1, W.numel()))
        return rms

    def count(self, like: Tensor) -> int:
        """How many elements all processes together hold of such a tensor."""
        return like.numel()

    # ---- what is not one element's business, where a method needs it ------------------------------------------------

    @property
    def world(self) -> ProcessGroup:
        """The processes that must agree about this parameter."""
        return ProcessGroup.of_replicas(self.parameter.device)

    def whole_of(self, own: Tensor) -> Tensor:
        """The whole tensor of which ``own``, laid out as this parameter, is this process's part. Collective."""
        return own

    def part_of(self, whole: Tensor) -> Tensor:
        """The inverse of ``whole_of``."""
        return whole

    def whole_at(self, own: Tensor, owner: int) -> Tensor | None:
        """``whole_of`` for process ``owner`` alone; None elsewhere, but where each has all of it. Collective."""
        return own

    def whole_from(self, own: Tensor, found: Tensor | None, owner: int, world: ProcessGroup) -> Tensor:
        """What ``whole_at`` gave ``owner``, as it is there now, on all processes. Collective."""
        return world.send_from(own, owner)

    def column_squares(self) -> Tensor:
        """This process's share of the sums over rows of the squared weights (n), in fp32 at least."""
        squares: Tensor = self.parameter.detach().to(self._wide).square().sum(0)
        return squares

    def divide_columns(self, divisors: Tensor) -> None:
        """W <- W / divisors (n), rounded once."""
        self.parameter.copy_(self.parameter / divisors)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.parameter.dtype, torch.float32)

    def write(
        self, direction: Tensor | LowRankUpdate, step_size: float, decay: float | Tensor, decay_first: bool
    ) -> None:
        """W <- W - step_size * direction, and W <- W - decay * W before or, as in GaLore's code, after it.

        A decay that is a tensor comes first.
        """
        W = self.parameter
        if isinstance(decay, Tensor) or (decay and decay_first):  # a tensor is not asked: that would stop the device
            W.mul_(1 - decay)
        self.move(direction, -step_size)
        if not (decay_first or isinstance(decay, Tensor)) and decay:
            W.add_(W, alpha=-decay)

    def move(self, direction: Tensor | LowRankUpdate, alpha: float) -> None:
        """W <- W + alpha * direction."""
        self._add(self.parameter, direction, alpha)

    def _add(self, weights: Tensor, direction: Tensor | LowRankUpdate, alpha: float) -> None:
        if isinstance(direction, LowRankUpdate):
            direction.write_to_(weights, alpha, self.room)
        else:
            weights.add_(direction, alpha=alpha)


class FullMatrix(FullShard):
    """An m x n matrix whose moments live in a subspace of rank r."""

    ranked = True

    def __init__(self, parameter: Tensor, position: int, room: Workspace, frame: ProjectionSide) -> None:
        super().__init__(parameter, position, room)
        self.frame = frame

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        return self.frame.projected_shape

    @property
    def block_shape(self) -> tuple[int, int]:
        """The shape of ``grad`` and ``weights``: all lines, or those that this process works on."""
        return self.frame.shape

    @property
    def weights(self) -> Tensor:
        return self.parameter

    def rewrite(self, weights: Tensor) -> None:
        """W <- weights, laid out as ``weights`` is."""
        if weights is not self.parameter:
            self.parameter.copy_(weights)

    def own(self, like: Tensor) -> Tensor:
        """The lines of which this process is the one that counts them."""
        return like

    def own_rows(self, like: Tensor, begin: int, end: int) -> Tensor:
        """``own``, and of these the rows from ``begin`` to ``end`` of the whole matrix. On the right only."""
        return like[begin:end]

    def sum_(self, tensor: Tensor) -> Tensor:
        """A sum over this process's own lines, made the sum over all lines, in place."""
        return tensor

    def row_sums(self, like: Tensor) -> Tensor:
        """m x 1."""
        sums: Tensor = like.sum(dim=1, keepdim=True)
        return sums

    def row_norms(self, like: Tensor) -> Tensor:
        """m x 1."""
        norms: Tensor = torch.linalg.vector_norm(like, dim=1, keepdim=True)
        return norms

    def solving(self, block: Tensor, find: Callable[[Tensor], Tensor]) -> Solving:
        """``find`` of the whole matrix that ``block`` is the lines of, begun."""
        return Solving(find, block, _found)

    def kept(self, rows: Tensor) -> Tensor:
        """What this process keeps of the rows of a basis, which all processes have."""
        return rows

    def collected(self, kept: Tensor, count: int) -> Tensor:
        """All ``count`` rows of a basis from what each process keeps."""
        return kept


def _found(columns: Tensor | None) -> Tensor:
    assert columns is not None, "a whole matrix is solved where it is"
    return columns


def has_subspace(shard: FullShard) -> TypeGuard[FullMatrix]:
    return shard.ranked
