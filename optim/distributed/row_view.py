"""A range of a flattened tensor as rows of any width: of a matrix, of its groups of m, of its blocks.

A row that is cut by a boundary is completed from its other parts, so that every process that holds a part of it has all
of it; it counts for the one that holds its first element. Where boundaries lie between rows, the rows are a view and
nothing is sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .process_group import ProcessGroup
from .shard_range import ShardRange


class RowView:
    """``held`` as rows of ``width`` elements, which divides the tensor's."""

    def __init__(self, held: ShardRange, width: int) -> None:
        self.held, self.width = held, width
        self.count = math.prod(held.shape) // max(1, width)
        spans = list(zip(held.bounds, held.bounds[1:], strict=False))
        # rows of each process: those it holds a part of, and those whose first element it holds
        self.touched_by = [(a // width, -(-b // width)) if b > a else (-(-a // width),) * 2 for a, b in spans]
        self.counted_by = [(-(-a // width), -(-b // width)) for a, b in spans]
        self.cut = sorted({bound // width for bound in held.bounds[1:-1] if bound % width})

    @property
    def touched(self) -> tuple[int, int]:
        """From which row to which this process holds a part."""
        return self.touched_by[self.held.processes.index]

    @property
    def counted(self) -> tuple[int, int]:
        """From which row to which this process is the one that counts them."""
        return self.counted_by[self.held.processes.index]

    def counted_of(self, rows: Tensor) -> Tensor:
        """Of ``rows``, one for each that this process touches, those that it counts."""
        begin, end = self.counted
        return rows.narrow(0, begin - self.touched[0], end - begin)

    @property
    def lead(self) -> int:
        """Elements of the first row touched that come before this process's."""
        return self.held.start - self.touched[0] * self.width

    def parts_of_cut_rows(self, own: Tensor) -> Tensor:
        """This process's parts of the rows that are cut (cut x width), zeros elsewhere."""
        rows = own.new_zeros(len(self.cut), self.width)
        start, stop, width = self.held.start, self.held.stop, self.width
        for row, target in zip(self.cut, rows, strict=True):
            a, b = max(start, row * width), min(stop, (row + 1) * width)
            if b > a:
                target[a - row * width : b - row * width] = own[a - start : b - start]
        return rows

    def rows(self, own: Tensor, completed: Tensor | None) -> Tensor:
        """The rows that this process touches, all of each, of the flat tensor ``own``: a view where none is cut here.

        ``completed`` are the rows that are cut, as ``complete_rows`` has them.
        """
        first, last = self.touched
        here = [row for row in self.cut if first <= row < last]
        if not here:
            return own.view(last - first, self.width)
        assert completed is not None
        rows = own.new_empty(last - first, self.width)
        rows.view(-1)[self.lead : self.lead + own.numel()] = own
        for row in here:
            rows[row - first] = completed[self.cut.index(row)]
        return rows

    def flat(self, rows: Tensor) -> Tensor:
        """The inverse of ``rows``: this process's elements, flat."""
        return rows.reshape(-1)[self.lead : self.lead + self.held.numel]

    def gather_rows(self, *own: Tensor) -> list[Tensor]:
        """``rows`` of flat tensors laid out as the range is. Collective where a row is cut: one message for all."""
        completed = complete_rows([self] * len(own), own)
        return [self.rows(part, rows) for part, rows in zip(own, completed, strict=True)]


def complete_rows(views: Sequence[RowView], own: Sequence[Tensor]) -> list[Tensor | None]:
    """The cut rows of several tensors, each whole, by one sum a process group. Collective."""
    parts = [view.parts_of_cut_rows(part) if view.cut else None for view, part in zip(views, own, strict=True)]
    sums = [(view.held.processes, part) for view, part in zip(views, parts, strict=True) if part is not None]
    all_reduce_together_(sums)
    return parts


def all_reduce_together_(parts: Sequence[tuple[ProcessGroup, Tensor]]) -> None:
    """Each tensor summed over the processes of its group, in place, by one message a group. Collective."""
    groups = {id(processes.group): processes for processes, _ in parts}
    for key, processes in groups.items():
        mine = [part for other, part in parts if id(other.group) == key]
        packed = processes.all_reduce_(torch.cat([part.view(-1) for part in mine]))
        for part, whole in zip(mine, torch.split(packed, [part.numel() for part in mine]), strict=True):
            part.copy_(whole.view(part.shape))
