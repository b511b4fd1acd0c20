"""AdamW on a matrix of which some weights are zero and stay it, without a mask and half of it at a time.

Pruned weights are remembered by being zero: none that stays is ever zero, but the smallest normal number instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.rules import MOMENTS, TORCH_ADAM
from ..core.types import Group, State
from ..distributed import FullShard

PARTS = 2  # what a gradient in fp32, its penalty and a direction need beside each other stays below one matrix

Gradient = Callable[[Tensor, Tensor], Tensor]  # of a part of W, and of G


def keep_only_(weights: Tensor, kept: Tensor) -> None:
    """Those that are not ``kept`` (bool) become zero, and those that are, other than zero."""
    weights.masked_fill_(kept & (weights == 0), torch.finfo(weights.dtype).tiny)
    weights.masked_fill_(~kept, 0.0)


def adamw_(shard: FullShard, group: Group, state: State, gradient: Gradient | None = None, hold: bool = False) -> None:
    """One step of AdamW on ``gradient(W, G)``, G by default; with ``hold``, what is zero stays it."""
    moments = [state[name].view(-1).chunk(PARTS) for name in MOMENTS]
    for W, G, *own in zip(shard.parameter.view(-1).chunk(PARTS), shard.gradient.reshape(-1).chunk(PARTS), *moments,
                          strict=True):  # fmt: skip
        kept = W != 0 if hold else None
        part = {"step": state["step"], **dict(zip(MOMENTS, own, strict=True))}
        N, correction = TORCH_ADAM.direction(G if gradient is None else gradient(W, G), part, group)
        if group["weight_decay"]:
            W.mul_(1 - group["lr"] * group["weight_decay"])
        W.add_(N, alpha=-group["lr"] * correction)
        if kept is not None:
            keep_only_(W, kept)
