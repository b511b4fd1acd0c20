"""A slice of a matrix that is worked on in lines: DeepSpeed ZeRO's flat partitions, and FSDP2's rows.

A slice is a range of the flattened matrix. The lines that a process works on come from it:

    right    the rows it touches (row_view.py): where boundaries lie between rows, a view, and nothing is sent.
    left     columns, as many of all as it holds of the matrix, by one exchange of blocks; the update comes back the
             same way. Each process sends and receives its part of the matrix at most, whatever the rank: less than a
             reduce-scatter and an all-gather of r x n each from a world size > 2 m / r on. A process that holds all of
             a matrix works on all of it and sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..numbers import Number, add_
from .flat import rms_of_parts
from .full import FullMatrix, PendingSolve, Update
from .process_group import ProcessGroup
from .projection import LowRankUpdate, ProjectionSide
from .row_view import RowView, complete_rows
from .shard_range import Runs, ShardRange
from .workspace import Workspace

SHARD_BASIS_MIN_WORLD_SIZE = 8  # a replicated basis then outweighs the sharded moments


class MatrixShard(FullMatrix):
    """A slice of an m x n matrix whose moments live in a subspace of rank r.

    Args:
        shard_basis: whether each process keeps a part of the basis; None from ``SHARD_BASIS_MIN_WORLD_SIZE`` processes
            on.
    """

    split = True

    def __init__(
        self,
        parameter: Tensor,
        gradient: Tensor,
        held: ShardRange,
        position: int,
        workspace: Workspace,
        side: ProjectionSide,
        shard_basis: bool | None = False,
    ) -> None:
        super().__init__(parameter, position, workspace, side)
        self.shape, self.held, self._gradient = held.shape, held, gradient
        many = held.processes.size >= SHARD_BASIS_MIN_WORLD_SIZE
        self.shard_basis = many if shard_basis is None else shard_basis
        self.view = RowView(held, side.shape[1])
        self.completed: Tensor | None = None  # the cut rows of the gradient (cut x n), where there are any
        self._kept_weights: Tensor | None = None

    @property
    def held_gradient(self) -> Tensor:
        return self._gradient

    def let_gradient_go(self) -> None:
        del self._gradient
        self.completed = None

    @property
    def first_element(self) -> int:
        return self.held.start

    @property
    def processes(self) -> ProcessGroup:
        return self.held.processes

    @property
    def solvers(self) -> int:  # type: ignore[override]
        return self.processes.size

    # ---- where things lie -------------------------------------------------------------------------------------------

    def _columns_of(self, index: int) -> tuple[int, int]:
        """The columns that a process works on where the left side is projected."""
        m, n = self.side.shape
        if self.held.chunked:
            share = -(-n // self.processes.size)
            return min(index * share, n), min((index + 1) * share, n)
        return -(-self.held.bounds[index] // m), -(-self.held.bounds[index + 1] // m)

    @property
    def lines(self) -> tuple[int, int]:
        """From which line to which this process works."""
        return self.view.touched if self.side.right else self._columns_of(self.processes.index)

    @property
    def line_ranges(self) -> list[tuple[int, int]]:
        """From which line to which each process counts."""
        if self.side.right:
            return self.view.counted_by
        return [self._columns_of(index) for index in range(self.processes.size)]

    @property
    def block_shape(self) -> tuple[int, int]:
        m, n = self.side.shape
        first, last = self.lines
        return (last - first, n) if self.side.right else (m, last - first)

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        rows, columns = self.block_shape
        return (rows, self.side.rank) if self.side.right else (self.side.rank, columns)

    @property
    def runs(self) -> Runs:
        rows, columns = self.side.projected_shape
        first, last = self.lines
        if self.side.right:
            return Runs(1, (last - first) * columns, first * columns, 0, rows * columns)
        return Runs(rows, last - first, first, columns, rows * columns)

    def own(self, like: Tensor) -> Tensor:
        return self.own_lines(like) if self.side.right else like

    def own_lines(self, lined: Tensor) -> Tensor:
        """``own`` of a tensor whose first dimension counts lines."""
        begin, end = self.line_ranges[self.processes.index]
        return lined.narrow(0, begin - self.lines[0], end - begin)

    def own_rows(self, like: Tensor, begin: int, end: int) -> Tensor:
        first, last = self.view.counted
        return self.own(like)[max(begin, first) - first : max(min(end, last), first) - first]

    # ---- slices to lines and back -----------------------------------------------------------------------------------

    def gather_grad(self) -> Tensor:
        return self._lines(self.gradient, self.completed)

    def lines_of(self, own: Tensor) -> Tensor:
        flat = own.reshape(-1)
        return self._lines(flat, complete_rows([self.view], [flat])[0])

    def gather_weights(self, keep: bool = False) -> Tensor:
        weights, self._kept_weights = self._kept_weights, None
        if weights is None:
            weights = self._lines(self.parameter, complete_rows([self.view], [self.parameter])[0])
        if keep:
            self._kept_weights = weights
        return weights

    def _lines(self, own: Tensor, completed: Tensor | None) -> Tensor:
        rows = self.view.rows(own, completed)
        if self.side.right:
            return rows
        m, _ = self.side.shape
        counted = self.view.counted_of(rows)
        parts = [counted[:, a:b].reshape(-1) for a, b in map(self._columns_of, range(self.processes.size))]
        a, b = self.lines
        expected = [(last - first) * (b - a) for first, last in self.view.counted_by]
        received = self.processes.all_to_all(torch.cat(parts), [part.numel() for part in parts], expected)
        return received.view(m, b - a)

    def _flat(self, lines: Tensor) -> Tensor:
        """This process's slice (flat) of an m x n tensor of which every process gives its lines."""
        if self.side.right:
            return self.view.flat(lines)
        first, last = self.view.touched
        parts = [lines[a:b].reshape(-1) for a, b in self.view.touched_by]
        widths = [b - a for a, b in map(self._columns_of, range(self.processes.size))]
        expected = [(last - first) * width for width in widths]
        received = self.processes.all_to_all(torch.cat(parts), [part.numel() for part in parts], expected)
        blocks = torch.split(received, expected)
        return self.view.flat(
            torch.cat([b.view(last - first, width) for b, width in zip(blocks, widths, strict=True)], dim=1)
        )

    def add_(self, update: Update, alpha: Number) -> None:
        if self.side.right and not self.view.cut:
            self._add_to(self.parameter.view(self.block_shape), update, alpha)
        else:
            dense = update.dense() if isinstance(update, LowRankUpdate) else update
            assert isinstance(dense, Tensor), "of a matrix that is worked on in lines"
            add_(self.parameter, self._flat(dense).to(self.parameter.dtype), alpha)

    def rewrite(self, weights: Tensor) -> None:
        self.parameter.copy_(self._flat(weights))

    # ---- what lines have in common ----------------------------------------------------------------------------------

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return self.processes.all_reduce_(tensor)

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        return self.processes.all_reduce_max_(tensor)

    def norm(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.all_reduce_(super().norm(self.own(like), dtype).square_()).sqrt_()

    def mean(self, like: Tensor, dim: int) -> Tensor:
        axis = self.side.line_axis
        if dim % 2 != axis:
            return like.mean(dim=dim)
        return self.all_reduce_(self.own(like).sum(dim=dim)) / self.side.lines

    def count(self, like: Tensor) -> int:
        return like.shape[1 - self.side.line_axis] * self.side.lines

    def weight_rms(self) -> Tensor:
        return rms_of_parts(self.parameter, self.held)

    def row_sums(self, like: Tensor) -> Tensor:
        sums = super().row_sums(like)
        return sums if self.side.right else self.all_reduce_(sums)

    def row_norms(self, like: Tensor) -> Tensor:
        if self.side.right:
            return super().row_norms(like)
        return self.all_reduce_(super().row_norms(like).square_()).sqrt_()

    def shard_rows(self, rows: Tensor) -> Tensor:
        return rows[self.processes.share(len(rows))].clone() if self.shard_basis else rows

    def all_gather_rows(self, own: Tensor, count: int) -> Tensor:
        return self.processes.all_gather_rows(own, count) if self.shard_basis else own

    def solve(self, block: Tensor, find: Callable[[Tensor], Tensor]) -> PendingSolve:
        """One process gathers the matrix and finds; the others get what it found (side x r)."""
        owner = self.position % self.processes.size
        width = self.side.line_length
        lines = self.own_lines(block if self.side.right else block.t())
        sizes = [(last - first) * width for first, last in self.line_ranges]
        gathered = self.processes.gather(lines.contiguous().view(-1), sizes, owner)
        matrix = None if gathered is None else gathered.view(-1, width)

        def share(found: Tensor | None) -> Tensor:
            columns = block.new_empty(self.side.basis_shape) if found is None else found.contiguous()
            return self.processes.broadcast_(columns, owner)

        return PendingSolve(find, matrix if matrix is None or self.side.right else matrix.t(), share)


class RowShard(MatrixShard):
    """A slice of an m x n tensor whose moments live in its own coordinates but are sums over its rows and columns."""

    ranked = False

    def __init__(
        self, parameter: Tensor, gradient: Tensor, held: ShardRange, position: int, workspace: Workspace
    ) -> None:
        m, n = held.shape
        super().__init__(parameter, gradient, held, position, workspace, ProjectionSide((m, n), n, right=True))


def complete_gradients(shards: Sequence[MatrixShard]) -> None:
    """Complete the cut rows of all gradients of a step, by one sum a process group. Collective."""
    completed = complete_rows([shard.view for shard in shards], [shard.gradient for shard in shards])
    for shard, rows in zip(shards, completed, strict=True):
        shard.completed = rows
