"""Update rules: pure arithmetic from a gradient and its state to a direction.

A rule sees coordinates only. Whether they are a whole tensor or a projected matrix is the caller's business.
``Rule`` names what an optimizer needs to know of one: ``ADAM`` and ``LION``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..validation import is_real, require

Shape = torch.Size | tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """``check`` refuses bad group values, ``state`` makes zero moments, ``direction`` updates them in place and gives
    the direction with the factor on the learning rate. ``decay_first``: weights decay before the step, not after."""

    check: Callable[[dict[str, Any]], None]
    state: Callable[[Shape, torch.dtype, torch.device], dict[str, Tensor]]
    direction: Callable[[Tensor, dict[str, Tensor], dict[str, Any]], tuple[Tensor, float]]
    decay_first: bool = False


def _check_betas(group: dict[str, Any]) -> None:
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(is_real(b) and 0 <= b < 1 for b in betas)
    require(pair, "betas must be two numbers in [0, 1)", betas)


def check_adam(group: dict[str, Any]) -> None:
    _check_betas(group)
    require(is_real(group["eps"]) and group["eps"] >= 0, "eps must be a number >= 0", group["eps"])


def adam_state(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {
        "exp_avg": torch.zeros(shape, dtype=dtype, device=device),
        "exp_avg_sq": torch.zeros(shape, dtype=dtype, device=device),
    }


def adam(gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, float]:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) as GaLore's code and the former Hugging Face ``AdamW`` write it.

        M <- b1 M + (1 - b1) R          V <- b2 V + (1 - b2) R * R
        N  = M / (sqrt(V) + eps)        correction = sqrt(1 - b2^t) / (1 - b1^t)

    Returns ``(N, correction)``: the step is ``lr * correction * N``. ``eps`` is not divided by the second bias
    correction; ``torch.optim.AdamW`` divides it, so the two differ where sqrt(V) is near ``eps``.
    """
    beta1, beta2 = group["betas"]
    M, V = state["exp_avg"], state["exp_avg_sq"]
    R = gradient.to(M.dtype)
    M.mul_(beta1).add_(R, alpha=1 - beta1)
    V.mul_(beta2).addcmul_(R, R, value=1 - beta2)
    N = V.sqrt().add_(group["eps"])
    torch.div(M, N, out=N)
    t = state["step"].item()  # lives on the CPU: reading it does not stop a GPU
    return N, math.sqrt(1 - beta2**t) / (1 - beta1**t)


def lion_state(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {"exp_avg": torch.zeros(shape, dtype=dtype, device=device)}


def lion(gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, float]:
    """Lion (Chen et al. 2023, arXiv:2302.06675).

        N  = sign(b1 M + (1 - b1) R)                 the sign of the OLD moment, interpolated
        M <- b2 M + (1 - b2) R                       after it; no bias correction, no eps

    The order of the operations matters to the bit: a sign flips at the last rounding.
    """
    beta1, beta2 = group["betas"]
    M = state["exp_avg"]
    R = gradient.to(M.dtype)
    N = M.mul(beta1).add_(R, alpha=1 - beta1).sign_()
    M.mul_(beta2).add_(R, alpha=1 - beta2)
    return N, 1.0


ADAM = Rule(check_adam, adam_state, adam)
LION = Rule(_check_betas, lion_state, lion, decay_first=True)
