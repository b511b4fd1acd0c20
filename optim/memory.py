"""What an optimizer's state costs."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .core.optimizer import ShardedOptimizer
from .distributed import Cut, ParamRef, by_rows, flat_length
from .state.spec import ERRORS, INDICES, MOMENTS, PROJECTORS, HeldTensor

__all__ = [
    "ERRORS",
    "INDICES",
    "MOMENTS",
    "PROJECTORS",
    "adamw_state_bytes",
    "bytes_by_kind",
    "dtype_of_moments",
    "planned_state",
    "planned_state_by_kind",
    "state_by_kind",
    "state_bytes",
]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that ``optimizer`` (any torch optimizer) holds as state in this process.

    Args:
        optimizer: of ``gracile.optim`` or ``torch.optim``; it has no state before its first step.

    Example:
        >>> from torch import nn
        >>> from gracile.optim import GaLoreAdamW, param_groups, state_bytes
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> groups = param_groups(model, rank=4, target_modules="all-linear")
        >>> optimizers = GaLoreAdamW(groups, lr=0.01), torch.optim.AdamW(model.parameters())
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> for optimizer in optimizers:
        ...     optimizer.step()
        ...     print(state_bytes(optimizer))
        4048
        18768
    """
    return state_by_kind(optimizer).total()


def adamw_state_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes that ``torch.optim.AdamW`` would hold for ``parameters``: two moments in their dtype, a fp32 counter."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in parameters)


def state_by_kind(optimizer: torch.optim.Optimizer) -> Counter[str]:
    """Bytes of state that ``optimizer`` holds in this process, by what they are for."""
    if isinstance(optimizer, ShardedOptimizer):
        return _by_declared_kind(optimizer)
    return bytes_by_kind(_as_moments(optimizer.state.values()))


def _by_declared_kind(optimizer: ShardedOptimizer) -> Counter[str]:
    declared = {
        position: {own.name: own.kind for own in tensors} for position, tensors in optimizer.held_by_position().items()
    }
    positions = {
        id(ref.parameter): ref.position
        for group in optimizer.param_groups
        for ref in optimizer.registry.of_group(group)
    }
    held: Counter[str] = Counter()
    for p, state in optimizer.state.items():
        for key, value in state.items():
            position, name = positions.get(id(p)), key
            if position is None and "." in key:  # an engine's flat tensor: keys begin with a position
                number, name = key.split(".", 1)
                position = int(number)
            kinds = {} if position is None else declared.get(position, {})
            held[kinds.get(name, MOMENTS)] += value.nbytes  # what a user added counts, too
    return held


def _as_moments(states: Iterable[Mapping[str, Any]]) -> Iterator[HeldTensor]:
    """What one of torch's optimizers keeps, all of which counts as moments."""
    for key, value in chain.from_iterable(state.items() for state in states):
        for tensor in value if isinstance(value, (list, tuple)) else [value]:  # LBFGS keeps lists
            if isinstance(tensor, Tensor):
                yield HeldTensor(key, tuple(tensor.shape), tensor.dtype, MOMENTS)


def bytes_by_kind(held: Iterable[HeldTensor]) -> Counter[str]:
    """Bytes of tensors of state by what they are for."""
    kinds: Counter[str] = Counter()
    for own in held:
        kinds[own.kind] += own.nbytes
    return kinds


def planned_state_by_kind(
    optimizer: torch.optim.Optimizer,
    cut: Cut | None = None,
    index: int = 0,
    size: int = 1,
    dtype: torch.dtype | None = None,
) -> Counter[str]:
    """Bytes of state that ``optimizer``, built on parameters of the meta device, will hold once it has stepped.

    The arguments are those of ``ShardedOptimizer.planned_state``. Torch's own optimizers take a step on meta tensors.
    """
    return bytes_by_kind(planned_state(optimizer, cut, index, size, dtype))


def planned_state(
    optimizer: torch.optim.Optimizer,
    cut: Cut | None = None,
    index: int = 0,
    size: int = 1,
    dtype: torch.dtype | None = None,
) -> list[HeldTensor]:
    """The tensors whose bytes ``planned_state_by_kind`` counts, by shape and dtype."""
    if not isinstance(optimizer, ShardedOptimizer):
        return list(_as_moments(_stepped(optimizer, cut, index, size, dtype)))
    return [own for _, state in optimizer.planned_state(cut, index, size, dtype) for own in state]


def dtype_of_moments(held: Iterable[HeldTensor]) -> torch.dtype | None:
    """The dtype of most numbers among the moments, None where there are none. That of moments in 8 bits is uint8."""
    elements: Counter[torch.dtype] = Counter()
    for own in held:
        elements[own.dtype] += math.prod(own.shape) if own.kind == MOMENTS and own.shape else 0
    return max(elements, key=elements.__getitem__) if elements.total() else None


def _stepped(
    optimizer: torch.optim.Optimizer, cut: Cut | None, index: int, size: int, dtype: torch.dtype | None
) -> Iterable[Mapping[str, Any]]:
    """The state of a copy that took a step: on meta tensors it computes nothing."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        trained = [p for p in group["params"] if p.requires_grad]
        if cut is not None:
            refs = [ParamRef(trained, i, i, tuple(p.shape)) for i, p in enumerate(trained)]
            if cut is by_rows:
                flats = [piece.numel for _, piece in cut(refs, index, size)]
            else:  # ZeRO steps one tensor for a group
                flats = [flat_length(cut, [ref.shape for ref in refs], size)]
            trained = [torch.empty(length, dtype=dtype or trained[0].dtype, device="meta") for length in flats]
        group |= {"params": trained, "fused": False, "foreach": False}
        for p in trained:
            p.grad = torch.empty_like(p)
    twin.step()
    return twin.state.values()
