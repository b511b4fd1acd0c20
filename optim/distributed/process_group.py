"""The processes among which a parameter is split, and what they exchange."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ProcessGroup:
    """A process group of torch. Every call is collective: all its processes make it, in the same order.

    ``index`` is this process's number among the ``size`` processes of the group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.index, self.size = dist.get_rank(group), dist.get_world_size(group)

    @classmethod
    def for_tensors_on(cls, device: torch.device, group: Any) -> ProcessGroup:
        """The processes of ``group``, with a backend that supports tensors on ``device``: an engine that offloads
        keeps them on the CPU, where NCCL cannot reach them. Collective, the first time."""
        if device.type == "cpu" and dist.get_backend(group) == "nccl":
            group = _gloo_group(group)
        return cls(group)

    @classmethod
    def of_replicas(cls, device: torch.device) -> ProcessGroup:
        """The processes that hold what this one holds: all that were started together, or this one alone."""
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls.for_tensors_on(device, None) if together else cls.alone()

    @staticmethod
    def alone() -> ProcessGroup:
        return FakeGroup(0, 1)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over all processes, in place; the same bits on each."""
        if tensor.numel():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        """The largest of each element over all processes, in place."""
        if tensor.numel():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def all_to_all(self, sent: Tensor, counts: list[int], expected: list[int]) -> Tensor:
        """``counts[i]`` elements of ``sent`` (flat) go to process i; ``expected[i]`` come from it, in order."""
        received = sent.new_empty(sum(expected))
        dist.all_to_all_single(received, sent, expected, counts, group=self.group)
        return received

    def gather(self, sent: Tensor, expected: list[int], owner: int) -> Tensor | None:
        """The flat ``sent`` of all processes one after the other, at ``owner`` alone."""
        at_owner = self.index == owner
        counts = [sent.numel() if i == owner else 0 for i in range(self.size)]
        received = self.all_to_all(sent, counts, expected if at_owner else [0] * self.size)
        return received if at_owner else None

    def all_gather_rows(self, own: Tensor, count: int) -> Tensor:
        """``count`` rows of which each process has its ``share``, on every process."""
        share = -(-count // self.size)
        padded = own.new_zeros(share, *own.shape[1:])
        padded[: len(own)] = own
        rows = own.new_empty(share * self.size, *own.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(rows, padded, group=self.group)
        return rows[:count]

    def share(self, count: int) -> slice:
        """Which of ``count`` rows are this process's: equal shares, the last ones short or empty."""
        size = -(-count // self.size)
        return slice(min(self.index * size, count), min((self.index + 1) * size, count))

    def broadcast_(self, tensor: Tensor, owner: int) -> Tensor:
        """``tensor`` as process ``owner`` holds it, in place."""
        dist.broadcast(tensor, src=dist.get_global_rank(self.group, owner) if self.group else owner, group=self.group)
        return tensor


@lru_cache(maxsize=64)
def _gloo_group(group: Any) -> Any:
    members = dist.get_process_group_ranks(group) if group else list(range(dist.get_world_size()))
    return dist.new_group(members, backend="gloo", use_local_synchronization=True)  # only these processes take part


class FakeGroup(ProcessGroup):
    """Process ``index`` of ``size`` that exchanges nothing: on the meta device, where only shapes count, or alone."""

    def __init__(self, index: int, size: int) -> None:
        self.group, self.index, self.size = None, index, size

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_reduce_max_(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_to_all(self, sent: Tensor, counts: list[int], expected: list[int]) -> Tensor:
        return sent.new_empty(sum(expected))

    def all_gather_rows(self, own: Tensor, count: int) -> Tensor:
        rows = own.new_zeros(count, *own.shape[1:])
        rows[self.share(count)] = own
        return rows

    def broadcast_(self, tensor: Tensor, owner: int) -> Tensor:
        return tensor
