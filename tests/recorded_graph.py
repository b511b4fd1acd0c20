"""What a CUDA graph does, without one: the kernels of a step are written down as they are called, with the numbers that
they get from Python, and called again on the same memory.

    graph = captured(optimizer)      nothing has moved
    graph.replay()                   a step, of the gradients that are in the parameters' ``grad`` now

What the host would have computed between kernels is not computed again. On the pretended device (``pretend_device.py``)
a wait for it while kernels are written down is an error, as in CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gracile.optim.core import capture


class Graph(TorchDispatchMode):
    """The kernels of a block, and what they were given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, found in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and _memory(old) != _memory(new):
                    old.copy_(new)


def _memory(tensor: Tensor) -> int:
    return getattr(tensor, "held", tensor).data_ptr()  # of the pretended device


@contextmanager
def capturing() -> Iterator[None]:
    with patch.object(capture, "is_capturing", lambda: True):
        yield


@torch.no_grad()
def captured(optimizer: torch.optim.Optimizer) -> Graph:
    """One step of ``optimizer``: captured, and taken back, for CUDA runs no kernel that it captures."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    held += [value for state in optimizer.state.values() for value in state.values()]
    before = [tensor.detach().clone() for tensor in held]
    graph = Graph()
    with capturing(), graph:
        optimizer.step()
    for tensor, was in zip(held, before, strict=True):
        tensor.copy_(was)
    return graph
