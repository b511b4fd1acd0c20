"""The memory that an optimizer's step needs for a moment, found by taking steps on fake tensors, which have none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ...int8_weight import memory_of
from ...optim.core import optimizer as stepping
from ...optim.core import rounding
from ...optim.core.batches import AT_ONCE, MATRICES_AT_ONCE, launches_cost
from ...optim.core.optimizer import ShardedOptimizer
from ...optim.core.rules import with_numbers
from ...optim.core.types import Group, ParamStep, State
from ...optim.distributed import Block, Cut, FullShard, MatrixShard, blocks, complete_gradients, full, pieces_of, spans
from ...optim.state.spec import HeldTensor
from .fake_pass import Ledger, few_rows

STEPS = (0, 1)  # the first, in which subspaces are found, and the one after it
ALIKE = 2  # of what is moved one after the other and takes the same memory, as many as overlap


def step_bytes(
    optimizer: torch.optim.Optimizer,
    cut: Cut | None = None,
    index: int = 0,
    size: int = 1,
    dtype: torch.dtype | None = None,
    device: str = "meta",
    early: bool = False,
) -> int:
    """The most that a step of ``optimizer``, built on parameters of the meta device, allocates and frees again.

    The arguments are those of ``ShardedOptimizer.planned_shards``; ``device`` is ``cpu``, or ``meta`` for a GPU, where
    products are added in place; ``early``: each parameter moves by itself, in the backward pass. Of the classes of
    torch, which run fused here, it is nothing. A change of masks, whose sizes only the weights tell, is not in it.
    """
    if not isinstance(optimizer, ShardedOptimizer):
        return 0
    steps = STEPS[1:] if optimizer.matrix_key == "sparsity" else STEPS
    return max(_FakeStep(optimizer, cut, index, size, dtype, device).bytes_at(step, early) for step in steps)


class _FakeStep:
    def __init__(self, optimizer: ShardedOptimizer, *planned: Any) -> None:
        self.optimizer, self.mode = optimizer, FakeTensorMode(allow_non_fake_inputs=True)
        self.known: list[Tensor] = []
        self.groups: dict[int, Group] = {}  # one for all parameters of each, as in a step: they move together
        cut, index, size, dtype, device = planned
        states = dict(optimizer.planned_state(cut, index, size, dtype))
        with self.mode:
            shards = list(optimizer.planned_shards(cut, index, size, dtype, device))
            if optimizer.together is None:
                shards = list(_some_of_each(shards))
            self.work = [item for shard, group in shards for item in self._items(shard, group, states[shard.position])]

    def _items(self, shard: FullShard, group: Group, held: list[HeldTensor]) -> list[ParamStep]:
        state: State = {}
        for own in held:
            if own.on_host or own.name == "step":
                with _disable_current_modes():
                    state[own.name] = torch.zeros(own.shape, dtype=own.dtype)
            else:
                state[own.name] = torch.empty(own.shape, dtype=own.dtype, device=shard.device)
                self.known.append(state[own.name])
        if shard.held_gradient is None:
            shard.parameter.grad = torch.empty_like(shard.parameter)
        assert shard.held_gradient is not None
        self.known += [*memory_of(shard.parameter), shard.held_gradient]
        numbers = {**self.optimizer.later_keys, **with_numbers(group)}
        counter = torch.empty((), device=shard.device) if numbers["capturable"] else None
        numbers = self.groups.setdefault(group["group_number"], numbers)
        return [
            ParamStep(part, numbers, its, counter=counter)
            for part, its in self.optimizer.matrices_of(shard, group, state)
        ]

    def bytes_at(self, step: int, early: bool) -> int:
        """Of the step that comes after ``step`` others."""
        for item in self.work:
            item.state["step"].fill_(step)
        ledger = Ledger(self.known)
        with torch.no_grad(), self.mode, ledger, _Answers(), _stand_ins():
            for work in self._by_parameter() if early else [self.work]:
                complete_gradients([item.shard for item in work if isinstance(item.shard, MatrixShard)])
                self.optimizer.advance(work)
        return ledger.at_peak.bytes

    def _by_parameter(self) -> list[list[ParamStep]]:
        found: dict[int, list[ParamStep]] = {}
        for item in self.work:
            found.setdefault(item.shard.position, []).append(item)
        return list(found.values())


def _some_of_each(shards: list[tuple[FullShard, Group]]) -> Iterator[tuple[FullShard, Group]]:
    """Of those that take the same memory, as many as are in memory together: a batch and the next."""
    seen: Counter[Any] = Counter()
    for shard, group in shards:
        if 0 in shard.shape:
            continue
        held = getattr(shard, "held", None)
        kind = (group["group_number"], shard.shape, None if held is None else held.bounds)
        seen[kind] += 1
        most = MATRICES_AT_ONCE // 2 if shard.ranked else AT_ONCE
        batch = most // max(1, math.prod(shard.coordinates_shape)) if launches_cost(shard.device) else 0
        if seen[kind] <= ALIKE + batch:
            yield shard, group


class _Answers(TorchDispatchMode):
    """Clocks are real. What is asked of the device, of gradients that are finite and not zero, is answered so."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = [tensor for tensor in given if isinstance(tensor, FakeTensor)]
        if given and not fake:
            with _disable_current_modes():
                return function(*args, **(kwargs or {}))
        if function is torch.ops.aten._local_scalar_dense.default:
            dtype = fake[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return function(*args, **(kwargs or {}))


_made = torch.Generator


class _Generator(torch.Generator):
    """Of any device: there are none of those that are not here."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        return _made("cpu")


def _some_spans(size: int, at_once: int) -> Iterator[slice]:
    return islice(spans(size, at_once), ALIKE)


def _some_blocks(*of: Any) -> Iterator[Block]:
    return islice(blocks(*of), ALIKE)


def _some_pieces(shard: FullShard, at_once: int) -> Iterator[tuple[FullShard, int, int]]:
    held = ((piece, begin, end) for piece, begin, end in pieces_of(shard, at_once) if begin < end)
    return islice(held, ALIKE)


@contextmanager
def _stand_ins() -> Iterator[None]:
    with (
        patch.object(torch, "Generator", _Generator),
        patch.object(stepping, "pieces_of", _some_pieces),
        patch.object(rounding, "spans", _some_spans),
        patch.object(full, "blocks", _some_blocks),
        few_rows(),
    ):
        yield
