"""Which elements of a flattened parameter each process holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from .process_group import FakeGroup, ProcessGroup


@dataclass(frozen=True)
class ShardRange:
    """``bounds[i]`` to ``bounds[i + 1]`` of the flattened parameter are process i's; ``offset`` is where this process's
    part begins in its flat tensor."""

    shape: tuple[int, ...]
    bounds: tuple[int, ...]
    offset: int
    processes: ProcessGroup
    chunked: bool = False  # cut as torch cuts DTensors: other dimensions are then cut so, too

    @property
    def start(self) -> int:
        return self.bounds[self.processes.index]

    @property
    def stop(self) -> int:
        return self.bounds[self.processes.index + 1]

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def of(self, flat: Tensor) -> Tensor:
        """This process's part, a view into its flat tensor."""
        return flat.narrow(0, self.offset, self.numel)

    def gather(self, own: Tensor, owner: int) -> Tensor | None:
        """The whole of which ``own`` is this process's part, at process ``owner``; None at the others. Collective."""
        sizes = [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        flat = self.processes.gather(own.contiguous().view(-1), sizes, owner)
        return None if flat is None else flat.view(self.shape)

    def on_meta(self, index: int) -> ShardRange:
        """What process ``index`` holds, for shapes alone."""
        return replace(self, processes=FakeGroup(index, self.processes.size))


@dataclass(frozen=True)
class Runs:
    """Which elements of a whole tensor, flattened, a process holds: ``count`` runs of ``width`` of them, the first from
    ``begin`` on, each ``stride`` behind the one before; ``whole`` is how many there are on all processes."""

    count: int
    width: int
    begin: int
    stride: int
    whole: int

    @classmethod
    def all_of(cls, shape: tuple[int, ...]) -> Runs:
        numel = math.prod(shape)
        return cls(1, numel, 0, 0, numel)

    def begin_of(self, run: int) -> int:
        return self.begin + run * self.stride


def spans(size: int, at_once: int) -> Iterator[slice]:
    """Elements of a flat tensor, at most ``at_once`` of them at a time."""
    for begin in range(0, size, at_once):
        yield slice(begin, min(begin + at_once, size))
