"""What an optimizer's state costs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .core.optimizer import ShardedOptimizer
from .distributed import Cut, ParamRef, by_rows, flat_length

# What a tensor of state is for, by the beginning of its key.
MOMENTS, PROJECTORS, ERRORS, INDICES = "moments", "projectors", "error buffers", "indices"
KINDS = {"basis": PROJECTORS, "error": ERRORS, "indices": INDICES, "mask": INDICES, "residual_places": INDICES}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that ``optimizer`` (any torch optimizer) holds as state in this process."""
    return state_by_kind(optimizer).total()


def adamw_state_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes that ``torch.optim.AdamW`` would hold for ``parameters``: two moments in their dtype, a fp32 counter."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in parameters)


def kind_of(key: str) -> str:
    """What a tensor of state is for. Where an engine steps flat tensors, keys begin with a number."""
    word = str(key).rsplit(".", 1)[-1]
    return next((kind for begin, kind in KINDS.items() if word.startswith(begin)), MOMENTS)


def _by_kind(states: Iterable[Mapping[str, Any]]) -> Counter[str]:
    held: Counter[str] = Counter()
    for key, value in chain.from_iterable(state.items() for state in states):
        for tensor in value if isinstance(value, (list, tuple)) else [value]:  # LBFGS keeps lists
            if isinstance(tensor, Tensor):
                held[kind_of(key)] += tensor.numel() * tensor.element_size()
    return held


def state_by_kind(optimizer: torch.optim.Optimizer) -> Counter[str]:
    """Bytes of state that ``optimizer`` holds in this process, by what they are for."""
    return _by_kind(optimizer.state.values())


def planned_state_by_kind(
    optimizer: torch.optim.Optimizer,
    cut: Cut | None = None,
    rank: int = 0,
    size: int = 1,
    dtype: torch.dtype | None = None,
) -> Counter[str]:
    """Bytes of state that ``optimizer``, built on parameters of the meta device, will hold once it has stepped.

    The arguments are those of ``ShardedOptimizer.planned_state``. Torch's own optimizers take a step on meta tensors.
    """
    if isinstance(optimizer, ShardedOptimizer):
        return _by_kind(state for _, state in optimizer.planned_state(cut, rank, size, dtype))
    return _by_kind(_stepped(optimizer, cut, rank, size, dtype))


def _stepped(
    optimizer: torch.optim.Optimizer, cut: Cut | None, rank: int, size: int, dtype: torch.dtype | None
) -> Iterable[Mapping[str, Any]]:
    """The state of a copy that took a step: on meta tensors it computes nothing."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        trained = [p for p in group["params"] if p.requires_grad]
        if cut is not None:
            members = [ParamRef(trained, i, i, tuple(p.shape)) for i, p in enumerate(trained)]
            if cut is by_rows:
                flats = [piece.numel for _, piece in cut(members, rank, size)]
            else:  # ZeRO steps one tensor for a group
                flats = [flat_length(cut, [member.shape for member in members], size)]
            trained = [torch.empty(length, dtype=dtype or trained[0].dtype, device="meta") for length in flats]
        group |= {"params": trained, "fused": False, "foreach": False}
        for p in trained:
            p.grad = torch.empty_like(p)
    twin.step()
    return twin.state.values()
