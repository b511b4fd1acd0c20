"""The processes among which a parameter is split, and what they say to each other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ProcessGroup:
    """A process group. Every call is collective: all its processes make it, in the same order."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @classmethod
    def for_tensors_on(cls, device: torch.device, group: Any) -> ProcessGroup:
        """The processes of ``group``, speaking in a way that works for tensors on ``device``: an engine that offloads
        keeps them on the CPU, where NCCL cannot reach them. Collective, the first time."""
        if device.type == "cpu" and dist.get_backend(group) == "nccl":
            group = _host_group(group)
        return cls(group)

    @classmethod
    def of_replicas(cls, device: torch.device) -> ProcessGroup:
        """The processes that hold what this one holds: all that were started together, or this one alone."""
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls.for_tensors_on(device, None) if together else cls.alone()

    @staticmethod
    def alone() -> ProcessGroup:
        return FakeGroup(0, 1)

    def sum_(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over all processes, in place; the same bits on each."""
        if tensor.numel():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest_(self, tensor: Tensor) -> Tensor:
        """The largest of each element over all processes, in place."""
        if tensor.numel():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def exchange(self, sent: Tensor, counts: list[int], expected: list[int]) -> Tensor:
        """``counts[i]`` elements of ``sent`` (flat) go to process i; ``expected[i]`` come from it, in order."""
        received = sent.new_empty(sum(expected))
        dist.all_to_all_single(received, sent, expected, counts, group=self.group)
        return received

    def gather(self, sent: Tensor, expected: list[int], owner: int) -> Tensor | None:
        """The flat ``sent`` of all processes one after the other, at ``owner`` alone."""
        at_owner = self.rank == owner
        counts = [sent.numel() if i == owner else 0 for i in range(self.size)]
        received = self.exchange(sent, counts, expected if at_owner else [0] * self.size)
        return received if at_owner else None

    def all_rows(self, kept: Tensor, count: int) -> Tensor:
        """``count`` rows of which each process keeps its ``share``, on every process."""
        share = -(-count // self.size)
        padded = kept.new_zeros(share, *kept.shape[1:])
        padded[: len(kept)] = kept
        rows = kept.new_empty(share * self.size, *kept.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(rows, padded, group=self.group)
        return rows[:count]

    def share(self, count: int) -> slice:
        """Which of ``count`` rows this process keeps: equal shares, the last ones short or empty."""
        size = -(-count // self.size)
        return slice(min(self.rank * size, count), min((self.rank + 1) * size, count))

    def send_from(self, tensor: Tensor, owner: int) -> Tensor:
        """``tensor`` as process ``owner`` holds it, in place."""
        dist.broadcast(tensor, src=dist.get_global_rank(self.group, owner) if self.group else owner, group=self.group)
        return tensor


@lru_cache(maxsize=64)
def _host_group(group: Any) -> Any:
    ranks = dist.get_process_group_ranks(group) if group else list(range(dist.get_world_size()))
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)  # only these ranks take part


class FakeGroup(ProcessGroup):
    """Process ``rank`` of ``size`` where nothing is said: on the meta device, where only shapes count, or alone."""

    def __init__(self, rank: int, size: int) -> None:
        self.group, self.rank, self.size = None, rank, size

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def exchange(self, sent: Tensor, counts: list[int], expected: list[int]) -> Tensor:
        return sent.new_empty(sum(expected))

    def send_from(self, tensor: Tensor, owner: int) -> Tensor:
        return tensor
