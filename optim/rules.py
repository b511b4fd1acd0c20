"""Update rules: pure arithmetic from a gradient and its state to a direction.

A rule sees coordinates only. Whether they are a whole tensor or a projected matrix is the caller's business.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..validation import is_real, require


def check_adam(group: dict[str, Any]) -> None:
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(is_real(b) and 0 <= b < 1 for b in betas)
    require(pair, "betas must be two numbers in [0, 1)", betas)
    require(is_real(group["eps"]) and group["eps"] >= 0, "eps must be a number >= 0", group["eps"])


def adam_state(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
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
