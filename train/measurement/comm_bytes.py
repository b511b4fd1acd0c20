"""The bytes that a process sends to others while a block of code runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of a collective over n processes with tensors of so many bytes, what one of them sends in the usual ring algorithms.
SENT: dict[str, Callable[[int, int, int], float]] = {
    "allreduce": lambda n, first, second: 2 * (n - 1) / n * first,
    "_allgather_base": lambda n, first, second: (n - 1) / n * first,  # first: what comes out
    "_reduce_scatter_base": lambda n, first, second: (n - 1) / n * second,
    "alltoall_base": lambda n, first, second: second,
    "broadcast": lambda n, first, second: (n - 1) / n * first,
}


class Traffic(TorchDispatchMode):
    """``with Traffic() as traffic: ...``, then ``traffic.bytes``. On the thread that entered the block.

    What an all-to-all leaves with its own process counts too: the list of parts is not the dispatcher's to see.

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
