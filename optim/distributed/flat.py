"""A slice of a parameter whose elements are each their own business: DeepSpeed ZeRO's partitions and FSDP2's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .full import FullShard
from .process_group import ProcessGroup
from .row_view import all_reduce_together_
from .shard_range import Runs, ShardRange
from .workspace import Workspace


class FlatShard(FullShard):
    """A slice of a tensor whose moments live in its own coordinates."""

    split = True

    def __init__(
        self, parameter: Tensor, gradient: Tensor, held: ShardRange, position: int, workspace: Workspace
    ) -> None:
        super().__init__(parameter, position, workspace)
        self.shape, self.held, self._gradient = held.shape, held, gradient

    @property
    def held_gradient(self) -> Tensor:
        return self._gradient

    def let_gradient_go(self) -> None:
        del self._gradient

    @property
    def first_element(self) -> int:
        return self.held.start

    @property
    def processes(self) -> ProcessGroup:
        return self.held.processes

    @property
    def runs(self) -> Runs:
        return Runs(1, self.held.numel, self.held.start, 0, math.prod(self.shape))

    def norm(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.processes.all_reduce_(super().norm(like, dtype).square_()).sqrt_()

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        return self.processes.all_reduce_max_(tensor)

    def mean(self, like: Tensor, dim: int) -> Tensor:
        raise TypeError("a range of elements has no rows and columns; a method that needs them says so by needs_rows")

    def weight_rms(self) -> Tensor:
        return rms_of_parts(self.parameter, self.held)

    def count(self, like: Tensor) -> int:
        return math.prod(self.shape)

    # ---- the whole tensor -------------------------------------------------------------------------------------------

    def gather_whole(self, own: Tensor) -> Tensor:
        whole = own.new_zeros(math.prod(self.shape))
        whole[self.held.start : self.held.stop] = own
        return self.processes.all_reduce_(whole).view(self.shape)

    def part_of(self, whole: Tensor) -> Tensor:
        return whole.reshape(-1).narrow(0, self.held.start, self.held.numel)

    def gather_whole_at(self, own: Tensor, owner: int) -> Tensor | None:
        return self.held.gather(own, owner)

    def broadcast_whole(self, own: Tensor, found: Tensor | None, owner: int, processes: ProcessGroup) -> Tensor:
        return processes.broadcast_(own.new_empty(self.shape) if found is None else found, owner)

    # ---- columns ----------------------------------------------------------------------------------------------------

    def column_squares(self) -> Tensor:
        squares = self.parameter.to(self._wide).square()
        lead, tail = self._lead, self._tail
        return torch.cat([squares.new_zeros(lead), squares, squares.new_zeros(tail)]).view(-1, self.shape[1]).sum(0)

    def divide_columns(self, divisors: Tensor) -> None:
        rows = divisors.repeat((self._lead + self.held.numel + self._tail) // self.shape[1])
        self.parameter.copy_(self.parameter / rows.narrow(0, self._lead, self.held.numel))

    @property
    def _lead(self) -> int:
        """Elements of the first row of this part that come before it."""
        return self.held.start % self.shape[1]

    @property
    def _tail(self) -> int:
        """Elements of the last row of this part that come after it."""
        return -self.held.stop % self.shape[1]


def rms_of_parts(own: Tensor, held: ShardRange) -> Tensor:
    """The root mean square of the tensor of which ``own`` is this process's part. Collective."""
    squares = torch.linalg.vector_norm(own, dtype=torch.promote_types(own.dtype, torch.float32)).square_()
    return held.processes.all_reduce_(squares).div_(max(1, math.prod(held.shape))).sqrt_()


def all_reduce_shares_(parts: Sequence[tuple[FullShard, Tensor]]) -> None:
    """Make each process's share of a sum the sum over the processes that a parameter is split over, in place, by one
    message a process group. Collective."""
    all_reduce_together_([(shard.processes, part) for shard, part in parts if shard.split])
