"""A parameter of which this process holds a slice: DeepSpeed ZeRO's flat partitions, and FSDP2's rows.

A slice is a range of the flattened parameter. The lines of a matrix that a process works on come from it:

    right    the rows it touches. A row cut by a boundary is completed from its other parts, so that every process
             that holds a part of it has all of it; it counts for the one that holds its first element. Where
             boundaries lie between rows, the block is a view and nothing is sent.
    left     columns, as many of all as it holds of the matrix, by one exchange of blocks; the update comes back the
             same way. Each process sends and receives its part of the matrix at most, whatever the rank: less than a
             reduce-scatter and an all-gather of r x n each from world > 2 m / r on. A process that holds all of a
             matrix works on all of it and sends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .full import FullMatrix, FullShard, Runs, Solving
from .process_group import FakeGroup, ProcessGroup
from .projection import LowRankUpdate, ProjectionSide, Workspace


@dataclass(frozen=True)
class ShardRange:
    """``bounds[i]`` to ``bounds[i + 1]`` of the flattened parameter are process i's; ``offset`` is where this process's
    part begins in its flat tensor."""

    shape: tuple[int, ...]
    bounds: tuple[int, ...]
    offset: int
    world: ProcessGroup
    chunked: bool = False  # cut as torch cuts DTensors: other dimensions are then cut so, too

    @property
    def start(self) -> int:
        return self.bounds[self.world.rank]

    @property
    def numel(self) -> int:
        return self.bounds[self.world.rank + 1] - self.start

    def of(self, flat: Tensor) -> Tensor:
        """This process's part, a view into its flat tensor."""
        return flat.narrow(0, self.offset, self.numel)

    def on_paper(self, rank: int) -> ShardRange:
        """What process ``rank`` holds, for shapes alone."""
        return replace(self, world=FakeGroup(rank, self.world.size))


class FlatShard(FullShard):
    """A slice of a tensor whose moments live in its own coordinates."""

    split = True

    def __init__(self, parameter: Tensor, gradient: Tensor, piece: ShardRange, position: int, room: Workspace) -> None:
        super().__init__(parameter, position, room)
        self.shape, self.piece, self.gradient = piece.shape, piece, gradient

    @property
    def grad(self) -> Tensor:
        return self.gradient

    def norm(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.piece.world.sum_(super().norm(like, dtype).square_()).sqrt_()

    @property
    def runs(self) -> Runs:
        return Runs(1, self.piece.numel, self.piece.start, 0, math.prod(self.shape))

    def largest_(self, tensor: Tensor) -> Tensor:
        return self.piece.world.largest_(tensor)

    def weight_rms(self) -> Tensor:
        return _weight_rms(self.parameter, self.piece)

    def count(self, like: Tensor) -> int:
        return math.prod(self.shape)

    @property
    def world(self) -> ProcessGroup:
        return self.piece.world

    def whole_of(self, own: Tensor) -> Tensor:
        whole = own.new_zeros(math.prod(self.shape))
        whole[self.piece.start : self.piece.start + self.piece.numel] = own
        return self.world.sum_(whole).view(self.shape)

    def part_of(self, whole: Tensor) -> Tensor:
        return whole.reshape(-1).narrow(0, self.piece.start, self.piece.numel)

    def whole_at(self, own: Tensor, owner: int) -> Tensor | None:
        return put_together(own, self.piece, owner)

    def whole_from(self, own: Tensor, found: Tensor | None, owner: int, world: ProcessGroup) -> Tensor:
        return world.send_from(own.new_empty(self.shape) if found is None else found, owner)

    def column_squares(self) -> Tensor:
        squares = self.parameter.to(self._wide).square()
        return self._rows(squares, squares.new_zeros(self._lead + self._tail)).sum(0)

    def divide_columns(self, divisors: Tensor) -> None:
        rows = divisors.repeat((self._lead + self.piece.numel + self._tail) // self.shape[1])
        self.parameter.copy_(self.parameter / rows.narrow(0, self._lead, self.piece.numel))

    @property
    def _lead(self) -> int:
        """Elements of the first row of this part that come before it."""
        return self.piece.start % self.shape[1]

    @property
    def _tail(self) -> int:
        """Elements of the last row of this part that come after it."""
        return -(self.piece.start + self.piece.numel) % self.shape[1]

    def _rows(self, own: Tensor, filling: Tensor) -> Tensor:
        """``own`` in whole rows."""
        return torch.cat([filling[: self._lead], own, filling[self._lead :]]).view(-1, self.shape[1])


def put_together(own: Tensor, piece: ShardRange, owner: int) -> Tensor | None:
    """The whole of which ``own`` is this process's part, at ``owner``; None at the others."""
    sizes = [b - a for a, b in zip(piece.bounds, piece.bounds[1:], strict=False)]
    flat = piece.world.gather(own.contiguous().view(-1), sizes, owner)
    return None if flat is None else flat.view(piece.shape)


def _weight_rms(own: Tensor, piece: ShardRange) -> Tensor:
    squares = torch.linalg.vector_norm(own, dtype=torch.promote_types(own.dtype, torch.float32)).square_()
    return piece.world.sum_(squares).div_(max(1, math.prod(piece.shape))).sqrt_()


class MatrixShard(FullMatrix):
    """A slice of an m x n matrix whose moments live in a subspace of rank r."""

    split = True

    def __init__(
        self,
        parameter: Tensor,
        gradient: Tensor,
        piece: ShardRange,
        position: int,
        room: Workspace,
        frame: ProjectionSide,
        shard_basis: bool = False,
    ) -> None:
        super().__init__(parameter, position, room, frame)
        self.shape, self.piece, self.gradient, self.shard_basis = piece.shape, piece, gradient, shard_basis
        _, n = frame.shape
        spans = list(zip(piece.bounds, piece.bounds[1:], strict=False))
        # rows of each process: those it holds a part of, and those whose first element it holds
        self.touched = [(a // n, -(-b // n)) if b > a else (-(-a // n),) * 2 for a, b in spans]
        self.counted = [(-(-a // n), -(-b // n)) for a, b in spans]
        self.cut = sorted({c // n for c in piece.bounds[1:-1] if c % n})
        self.completed: Tensor | None = None  # the cut rows of the gradient (cut x n), where there are any

    # ---- where things lie ---------------------------------------------------------------------------------------

    @property
    def world(self) -> ProcessGroup:
        return self.piece.world

    @property
    def columns(self) -> tuple[int, int]:
        """The columns that this process works on where the left side is projected."""
        return self._columns_of(self.world.rank)

    def _columns_of(self, rank: int) -> tuple[int, int]:
        m, n = self.frame.shape
        if self.piece.chunked:
            share = -(-n // self.world.size)
            return min(rank * share, n), min((rank + 1) * share, n)
        return -(-self.piece.bounds[rank] // m), -(-self.piece.bounds[rank + 1] // m)

    @property
    def block_shape(self) -> tuple[int, int]:
        m, n = self.frame.shape
        first, last = self.lines
        return (last - first, n) if self.frame.right else (m, last - first)

    @property
    def coordinates_shape(self) -> tuple[int, ...]:
        rows, columns = self.block_shape
        return (rows, self.frame.rank) if self.frame.right else (self.frame.rank, columns)

    @property
    def runs(self) -> Runs:
        rows, columns = self.frame.projected_shape
        first, last = self.lines
        if self.frame.right:
            return Runs(1, (last - first) * columns, first * columns, 0, rows * columns)
        return Runs(rows, last - first, first, columns, rows * columns)

    @property
    def lines(self) -> tuple[int, int]:
        """From which line to which this process works."""
        return self.touched[self.world.rank] if self.frame.right else self.columns

    @property
    def line_ranges(self) -> list[tuple[int, int]]:
        """From which line to which each process counts."""
        return self.counted if self.frame.right else [self._columns_of(rank) for rank in range(self.world.size)]

    def own(self, like: Tensor) -> Tensor:
        return self.own_lines(like) if self.frame.right else like

    def own_lines(self, lined: Tensor) -> Tensor:
        """``own`` of a tensor whose first dimension counts lines."""
        begin, end = self.line_ranges[self.world.rank]
        return lined.narrow(0, begin - self.lines[0], end - begin)

    def own_rows(self, like: Tensor, begin: int, end: int) -> Tensor:
        first, last = self.counted[self.world.rank]
        return self.own(like)[max(begin, first) - first : max(min(end, last), first) - first]

    # ---- slices to lines and back -------------------------------------------------------------------------------

    @property
    def grad(self) -> Tensor:
        return self._lines(self.gradient, self.completed)

    @property
    def weights(self) -> Tensor:
        return self._lines(self.parameter, complete([self], [self.parameter])[0])

    def fragments(self, own: Tensor) -> Tensor:
        """This process's parts of the cut rows (cut x n), zeros elsewhere."""
        _, n = self.frame.shape
        rows = own.new_zeros(len(self.cut), n)
        start, end = self.piece.start, self.piece.start + self.piece.numel
        for row, target in zip(self.cut, rows, strict=True):
            a, b = max(start, row * n), min(end, (row + 1) * n)
            if b > a:
                target[a - row * n : b - row * n] = own[a - start : b - start]
        return rows

    def _rows(self, own: Tensor, completed: Tensor | None) -> Tensor:
        """The rows that this process touches, all of each: a view where no row is cut here."""
        _, n = self.frame.shape
        first, last = self.touched[self.world.rank]
        here = [row for row in self.cut if first <= row < last]
        if not here:
            return own.view(last - first, n)
        rows = own.new_empty(last - first, n)
        lead = self.piece.start - first * n
        rows.view(-1)[lead : lead + own.numel()] = own
        assert completed is not None
        for row in here:
            rows[row - first] = completed[self.cut.index(row)]
        return rows

    def _lines(self, own: Tensor, completed: Tensor | None) -> Tensor:
        rows = self._rows(own, completed)
        if self.frame.right:
            return rows
        m, _ = self.frame.shape
        first, _ = self.touched[self.world.rank]
        begin, end = self.counted[self.world.rank]
        counted = rows[begin - first : end - first]
        parts = [counted[:, a:b].reshape(-1) for a, b in map(self._columns_of, range(self.world.size))]
        a, b = self.columns
        expected = [(last - first) * (b - a) for first, last in self.counted]
        received = self.world.exchange(torch.cat(parts), [part.numel() for part in parts], expected)
        return received.view(m, b - a)

    def _slice(self, lines: Tensor) -> Tensor:
        """This process's slice (flat) of an m x n tensor of which every process gives its lines."""
        _, n = self.frame.shape
        first, last = self.touched[self.world.rank]
        rows = lines
        if not self.frame.right:
            parts = [lines[a:b].reshape(-1) for a, b in self.touched]
            widths = [b - a for a, b in map(self._columns_of, range(self.world.size))]
            expected = [(last - first) * width for width in widths]
            received = self.world.exchange(torch.cat(parts), [part.numel() for part in parts], expected)
            blocks = torch.split(received, expected)
            rows = torch.cat([b.view(last - first, w) for b, w in zip(blocks, widths, strict=True)], dim=1)
        lead = self.piece.start - first * n
        return rows.reshape(-1)[lead : lead + self.piece.numel]

    def move(self, direction: Tensor | LowRankUpdate, alpha: float) -> None:
        if self.frame.right and not self.cut:
            self._add(self.parameter.view(self.block_shape), direction, alpha)
        else:
            update = direction.dense() if isinstance(direction, LowRankUpdate) else direction
            self.parameter.add_(self._slice(update).to(self.parameter.dtype), alpha=alpha)

    def rewrite(self, weights: Tensor) -> None:
        self.parameter.copy_(self._slice(weights))

    # ---- what lines have in common ------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> Tensor:
        return self.world.sum_(tensor)

    def largest_(self, tensor: Tensor) -> Tensor:
        return self.world.largest_(tensor)

    def norm(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.sum_(super().norm(self.own(like), dtype).square_()).sqrt_()

    def mean(self, like: Tensor, dim: int) -> Tensor:
        lines = 0 if self.frame.right else 1
        if dim % 2 != lines:
            return like.mean(dim=dim)
        return self.sum_(self.own(like).sum(dim=dim)) / self.frame.shape[lines]

    def count(self, like: Tensor) -> int:
        line = like.shape[1 if self.frame.right else 0]
        return line * self.frame.shape[0 if self.frame.right else 1]

    def weight_rms(self) -> Tensor:
        return _weight_rms(self.parameter, self.piece)

    def row_sums(self, like: Tensor) -> Tensor:
        sums = super().row_sums(like)
        return sums if self.frame.right else self.sum_(sums)

    def row_norms(self, like: Tensor) -> Tensor:
        if self.frame.right:
            return super().row_norms(like)
        return self.sum_(super().row_norms(like).square_()).sqrt_()

    def kept(self, rows: Tensor) -> Tensor:
        return rows[self.world.share(len(rows))].clone() if self.shard_basis else rows

    def collected(self, kept: Tensor, count: int) -> Tensor:
        return self.world.all_rows(kept, count) if self.shard_basis else kept

    def solving(self, block: Tensor, find: Callable[[Tensor], Tensor]) -> Solving:
        """One process gathers the matrix and finds; the others get what it found (side x r)."""
        owner = self.position % self.world.size
        m, n = self.frame.shape
        width = n if self.frame.right else m
        lines = self.own_lines(block if self.frame.right else block.t())
        sizes = [(last - first) * width for first, last in self.line_ranges]
        gathered = self.world.gather(lines.contiguous().view(-1), sizes, owner)
        matrix = None if gathered is None else gathered.view(-1, width)

        def shared(found: Tensor | None) -> Tensor:
            columns = block.new_empty(self.frame.basis_shape) if found is None else found.contiguous()
            return self.world.send_from(columns, owner)

        return Solving(find, matrix if matrix is None or self.frame.right else matrix.t(), shared, self.world.size)


class RowShard(MatrixShard):
    """A slice of an m x n tensor whose moments live in its own coordinates but are sums over its rows and columns."""

    ranked = False

    def __init__(self, parameter: Tensor, gradient: Tensor, piece: ShardRange, position: int, room: Workspace) -> None:
        m, n = piece.shape
        super().__init__(parameter, gradient, piece, position, room, ProjectionSide((m, n), n, right=True))

    def rows_of(self, *own: Tensor) -> list[Tensor]:
        """The rows that this process touches (rows x n), all of each, of flat tensors laid out as its slice is.

        Collective where a row is cut: one message for all of them.
        """
        completed = complete([self] * len(own), own)
        return [self._rows(part, rows) for part, rows in zip(own, completed, strict=True)]


def complete(shards: Sequence[MatrixShard], own: Sequence[Tensor]) -> list[Tensor | None]:
    """The cut rows of several matrices, each whole, by one sum per world. Collective."""
    parts = [shard.fragments(part) if shard.cut else None for shard, part in zip(shards, own, strict=True)]
    sum_together_([(shard, part) for shard, part in zip(shards, parts, strict=True) if part is not None])
    return parts


def sum_together_(parts: Sequence[tuple[FullShard, Tensor]]) -> None:
    """Make each process's share of a sum the sum over the processes that a parameter is split over, in place, by one
    message per world. Collective."""
    split = [(shard.world, part) for shard, part in parts if shard.split]
    worlds = {id(world.group): world for world, _ in split}
    for key, world in worlds.items():
        mine = [part for other, part in split if id(other.group) == key]
        packed = world.sum_(torch.cat([part.view(-1) for part in mine]))
        for part, whole in zip(mine, torch.split(packed, [part.numel() for part in mine]), strict=True):
            part.copy_(whole.view(part.shape))
