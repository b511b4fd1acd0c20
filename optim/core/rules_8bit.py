"""Adam over moments that are codes in 8 bits, by the kernel of bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861):
it reads codes, moves them and writes codes, so that no moment is ever a tensor of numbers.

It scales blocks as it finds them, so it is for moments of which a process holds whole blocks, on a device that has it.
Elsewhere a codec makes numbers of the codes, and a rule moves those: the same, but for the rounding of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..distributed import FullShard
from ..state.blockwise_8bit import move_codes
from .rules import MOMENTS, Rule
from .rules_together import Clock
from .types import Group, State

WITH_KERNEL = {"cuda", "meta"}  # types of devices; a plan is on meta
MOST = 2**31 - 1  # elements that it counts


def is_for_codes(shard: FullShard, state: State) -> bool:
    """Whether the kernel may move a parameter, or the coordinates of one."""
    kinds = {state[key].dtype for key in MOMENTS if key in state}
    return shard.device.type in WITH_KERNEL and kinds == {torch.uint8} and not shard.split


def is_moved_in_place(W: Tensor, G: Tensor) -> bool:
    """Whether the kernel takes weights and a gradient as they lie."""
    return W.dtype == G.dtype and W.is_contiguous() and G.is_contiguous() and W.numel() <= MOST


def adam_of_codes(gradient: Tensor, state: State, group: Group) -> tuple[Tensor, float]:
    """``rules.adam(torch_eps=True)``, in fp32: weights of zero that go a step of -1 become its direction."""
    R = gradient.float().contiguous()
    N = torch.zeros_like(R)
    _move(N, R, state, group, lr=-1.0)
    return N, 1.0


def adamw_of_codes_in_place(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State], group: Group, clock: Clock
) -> None:
    """Contiguous weights moved by ``adam_of_codes`` and the learning rate, in no memory of its own."""
    for W, G, state in zip(weights, gradients, states, strict=True):
        _move(W, G, state, group, group["lr"])


def _move(W: Tensor, G: Tensor, state: State, group: Group, lr: float) -> None:
    move_codes(W, G, state, MOMENTS, lr=lr, betas=group["betas"], eps=group["eps"], step=int(state["step"].item()))


def of_codes(rule: Rule) -> Rule:
    """``TORCH_ADAM``, whenever it decays, over codes."""
    return replace(rule, direction=adam_of_codes, together=None, in_place=adamw_of_codes_in_place)
