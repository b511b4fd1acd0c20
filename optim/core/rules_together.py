"""The rules for many tensors at once, by torch's kernels that take lists: a launch for some thirty tensors.

``clock`` gives the number of the step, which all of them have, on their device: a fused kernel reads it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..numbers import Number, count_of, root_of
from .types import Group, State

Clock = Callable[[], Tensor]


def adam_together(
    gradients: Sequence[Tensor], states: Sequence[State], group: Group, clock: Clock, *, torch_eps: bool = False
) -> tuple[list[Tensor], Number]:
    """``rules.adam`` of tensors with the same clock, by torch's fused AdamW with zeros for weights: these become

    -M / (1 - b1^t) / (sqrt(V) / sqrt(1 - b2^t) + e)        e = eps, or eps / sqrt(1 - b2^t) as GaLore's code has it
    """
    beta1, beta2 = group["betas"]
    M, V = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
    t = count_of(states[0], group)
    root = root_of(1 - beta2**t)
    correction = root / (1 - beta1**t)
    if isinstance(root, Tensor):  # of which the fused kernel takes no eps
        return _adam_of_each(gradients, M, V, group, eps=group["eps"] * root if torch_eps else group["eps"]), correction
    R = [_laid_out_as(moment, own) for own, moment in zip(gradients, M, strict=True)]
    moved = _zeros_like(M)
    torch._fused_adamw_(
        moved, R, M, V, [], [clock()] * len(M),
        lr=-1 / correction, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=group["eps"] / (1.0 if torch_eps else root),
        amsgrad=False, maximize=False,
    )  # fmt: skip
    return moved, correction


def _adam_of_each(
    gradients: Sequence[Tensor], M: list[Tensor], V: list[Tensor], group: Group, eps: Number
) -> list[Tensor]:
    """M / (sqrt(V) + eps) of each, once the moments have taken up the gradients."""
    beta1, beta2 = group["betas"]
    R = [own.to(moment.dtype) for own, moment in zip(gradients, M, strict=True)]
    torch._foreach_mul_(M, beta1)
    torch._foreach_add_(M, R, alpha=1 - beta1)
    torch._foreach_mul_(V, beta2)
    torch._foreach_addcmul_(V, R, R, value=1 - beta2)
    N = list(torch._foreach_sqrt(V))
    for own in N:  # of a tensor, torch._foreach_add_ makes a number, which stops the device
        own.add_(eps)
    torch._foreach_reciprocal_(N)
    torch._foreach_mul_(N, M)
    return N


def adamw_in_place(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    group: Group,
    clock: Clock,
    *,
    torch_eps: bool = False,
) -> None:
    """Weights of the moments' dtype moved by ``adam_together`` and the learning rate, in no memory of its own."""
    beta1, beta2 = group["betas"]
    root = root_of(1 - beta2 ** count_of(states[0], group))
    M, V = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
    torch._fused_adamw_(
        list(weights), list(gradients), M, V, [], [clock()] * len(M),
        lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=0.0,
        eps=group["eps"] / (1.0 if torch_eps else root), amsgrad=False, maximize=False,
    )  # fmt: skip


def lion_together(
    gradients: Sequence[Tensor], states: Sequence[State], group: Group, clock: Clock
) -> tuple[list[Tensor], float]:
    """``rules.lion`` of several tensors, which does not ask the clock; M + (1 - b) (R - M) for b M + (1 - b) R."""
    beta1, beta2 = group["betas"]
    M = [state["exp_avg"] for state in states]
    R = [own.to(moment.dtype) for own, moment in zip(gradients, M, strict=True)]
    moved = list(torch._foreach_lerp(M, R, 1 - beta1))
    torch._foreach_sign_(moved)
    torch._foreach_lerp_(M, R, 1 - beta2)
    return moved, 1.0


def _laid_out_as(moment: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the moment's dtype and strides: a fused kernel takes no others."""
    R = gradient.to(moment.dtype)
    return R if R.stride() == moment.stride() else torch.empty_like(moment).copy_(R)


def _zeros_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In one piece of memory, which is one launch; with their strides, which loaded moments may have of their own."""
    flat = torch.zeros(sum(t.numel() for t in tensors), dtype=tensors[0].dtype, device=tensors[0].device)
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [part.as_strided(t.shape, t.stride()) for part, t in zip(parts, tensors, strict=True)]
