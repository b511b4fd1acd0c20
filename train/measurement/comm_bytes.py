"""The bytes that a process sends to others while a block of code runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Bytes that one of n processes sends in a collective's usual ring algorithm, from n and the bytes of its first two
# arguments.
SENT: dict[str, Callable[[int, int, int], float]] = {
    "allreduce": lambda n, first, second: 2 * (n - 1) / n * first,
    "_allgather_base": lambda n, first, second: (n - 1) / n * first,  # first: the output
    "_reduce_scatter_base": lambda n, first, second: (n - 1) / n * second,
    "alltoall_base": lambda n, first, second: second,
    "broadcast": lambda n, first, second: (n - 1) / n * first,
}


class Traffic(TorchDispatchMode):
    """``with Traffic() as traffic: ...``, then ``traffic.bytes``. On the thread that entered the block.

    Of an all-to-all, the part that a process sends to itself counts too: the dispatcher does not see the parts.

    Raises:
        NotImplementedError: for a collective that is not in ``SENT``.
    """

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name().split("::")[1].rstrip("_")
            if name not in SENT:
                raise NotImplementedError(f"how many bytes does c10d::{name} send?")
            first, second = (sum(map(_size, tree_leaves(argument))) for argument in args[:2])
            self.bytes += round(SENT[name](dist.get_world_size(), first, second))
        return func(*args, **(kwargs or {}))


def _size(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0
