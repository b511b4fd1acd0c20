"""Update rules: pure arithmetic from a gradient and its state to a direction.

A rule sees coordinates only. Whether they are a whole tensor or a projected matrix is the caller's business.
``Rule`` names what an optimizer needs to know of one: ``ADAM`` as GaLore's code has it, ``TORCH_ADAM`` as torch has it,
``LION``, ``ADAFACTOR``.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ...validation import flag, is_real, number, require
from ..numbers import Number, add_, count_of, root_of
from ..state.spec import Coordinates, StateSpec
from .rules_together import adam_together, adamw_in_place, lion_together

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, in one order on every process


@dataclass(frozen=True)
class Rule:
    """``check`` refuses bad group values, ``specs`` declares the moments, ``direction`` updates them in place and gives
    the direction with the factor on the learning rate; ``together`` does it for many tensors with the same clock, and
    ``in_place`` moves weights by it that no method has a direction of its own for. ``decay_first``: weights decay
    before the step, not after."""

    check: Callable[[dict[str, Any]], None]
    specs: Callable[[Coordinates, torch.dtype, dict[str, Any]], list[StateSpec]]
    direction: Callable[..., tuple[Tensor, Number]]  # of (gradient, state, group); Adafactor's asks for the shard too
    decay_first: bool = False
    needs_rows: bool = False  # a part of a matrix must come in whole rows
    together: Callable[..., tuple[list[Tensor], Number]] | None = (
        None  # of lists of gradients and states, group and clock
    )
    in_place: Callable[..., None] | None = None  # of lists of weights, gradients and states, group and clock


def plain(value: Any) -> Any:
    """The number in a tensor of one; anything else as it is. On a device it waits for it."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def with_numbers(group: dict[str, Any]) -> dict[str, Any]:
    """A group whose learning rate and betas are numbers, as a step reads them: once for all of its parameters."""
    held = [group["lr"], *group.get("betas", ())]
    if not any(isinstance(value, Tensor) for value in held):
        return group
    lr, *betas = map(plain, held)
    return {**group, "lr": lr, **({"betas": tuple(betas)} if betas else {})}


def check_lion(group: dict[str, Any]) -> None:
    number(">= 0")("lr", plain(group["lr"]))
    betas = group["betas"]
    is_pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    within = is_pair and all(is_real(b) and 0 <= b < 1 for b in map(plain, betas))
    require(within, "betas must be two numbers in [0, 1)", betas)


def check_adam(group: dict[str, Any]) -> None:
    check_lion(group)
    number(">= 0")("eps", group["eps"])


def adam_specs(coordinates: Coordinates, dtype: torch.dtype, group: dict[str, Any]) -> list[StateSpec]:
    return [coordinates.spec(name, dtype) for name in MOMENTS]


def adam(
    gradient: Tensor, state: MutableMapping[str, Tensor], group: dict[str, Any], *, torch_eps: bool = False
) -> tuple[Tensor, Number]:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) as GaLore's code and the former Hugging Face ``AdamW`` write it.

        M <- b1 M + (1 - b1) R          V <- b2 V + (1 - b2) R * R
        N  = M / (sqrt(V) + eps)        correction = sqrt(1 - b2^t) / (1 - b1^t)

    Returns ``(N, correction)``: the step is ``lr * correction * N``. ``eps`` is added before the second bias
    correction; ``torch_eps`` adds it after, as ``torch.optim.AdamW`` does. The two differ where sqrt(V) is near it.
    """
    beta1, beta2 = group["betas"]
    M, V = state["exp_avg"], state["exp_avg_sq"]
    R = gradient.to(M.dtype)
    M.mul_(beta1).add_(R, alpha=1 - beta1)
    V.mul_(beta2).addcmul_(R, R, value=1 - beta2)
    t = count_of(state, group)
    root = root_of(1 - beta2**t)
    N = V.sqrt() if R is gradient else torch.sqrt(V, out=R)  # a copy is used up
    N.add_(group["eps"] * root if torch_eps else group["eps"])
    torch.div(M, N, out=N)
    return N, root / (1 - beta1**t)


def lion_specs(coordinates: Coordinates, dtype: torch.dtype, group: dict[str, Any]) -> list[StateSpec]:
    return [coordinates.spec("exp_avg", dtype)]


def lion(gradient: Tensor, state: MutableMapping[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, float]:
    """Lion (Chen et al. 2023, arXiv:2302.06675).

        N  = sign(b1 M + (1 - b1) R)                 the sign of the OLD moment, interpolated
        M <- b2 M + (1 - b2) R                       after it; no bias correction, no eps

    The order of the operations matters to the bit: a sign flips at the last rounding.
    """
    beta1, beta2 = group["betas"]
    M = state["exp_avg"]
    N = M.mul(beta1).add_(gradient, alpha=1 - beta1).sign_()
    M.mul_(beta2).add_(gradient, alpha=1 - beta2)
    return N, 1.0


ADAFACTOR_CHECKS = {
    "relative_step": flag(),
    "scale_parameter": flag(),
    "warmup_init": flag(),
    "clip_threshold": number("> 0"),
    "decay_rate": number("< 0"),
    "beta1": number("in [0, 1)", optional=True),
}


def check_adafactor(group: dict[str, Any]) -> None:
    for key, check in ADAFACTOR_CHECKS.items():
        check(key, group[key])
    lr = plain(group["lr"])
    if group["relative_step"]:
        require(lr is None, "lr must be None where relative_step=True finds it from the step number", lr)
    else:
        require(is_real(lr) and lr >= 0, "lr must be a number >= 0 where relative_step=False", lr)
        require(not group["warmup_init"], "warmup_init must be False where relative_step=False", group["warmup_init"])
    eps = group["eps"]
    pair = isinstance(eps, (tuple, list)) and len(eps) == 2 and all(is_real(e) and e >= 0 for e in eps)
    require(pair, "eps must be two numbers >= 0", eps)


def adafactor_specs(coordinates: Coordinates, dtype: torch.dtype, group: dict[str, Any]) -> list[StateSpec]:
    specs = [coordinates.spec("exp_avg_sq", dtype)]
    if len(coordinates.shape) >= 2:
        specs = [
            coordinates.sum_over(-1, "exp_avg_sq_row", dtype),
            coordinates.sum_over(-2, "exp_avg_sq_col", dtype),
        ]
    if group["beta1"] is not None:
        specs.append(coordinates.spec("exp_avg", dtype))
    return specs


class Statistics(Protocol):
    """What a shard knows about all lines of a matrix."""

    def mean(self, like: Tensor, dim: int) -> Tensor: ...
    def rms(self, like: Tensor) -> Tensor: ...


def adafactor(
    gradient: Tensor, state: MutableMapping[str, Tensor], group: dict[str, Any], over: Statistics
) -> tuple[Tensor, float]:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) as fairseq's and Hugging Face's code write it.

        b2_t = 1 - t^decay_rate
        C_i  <- b2_t C_i + (1 - b2_t) mean_j(R_ij^2 + eps1)      D_j likewise over i     (m,) and (n,)
        U    =  R / sqrt(C_i D_j / mean(C))                      without a matrix: R / sqrt(V)
        N    =  U / max(1, rms(U) / clip_threshold)

    The first moment, where ``beta1`` asks for one, averages steps that contain the learning rate: the caller's part.
    ``over`` takes the means over the whole matrix, also where ``gradient`` is a part of its lines.
    """
    dtype = state["exp_avg_sq_row" if "exp_avg_sq_row" in state else "exp_avg_sq"].dtype
    R = gradient.to(dtype)
    beta2 = 1.0 - count_of(state, group) ** group["decay_rate"]
    squares = (R.square() if R is gradient else R.square_()).add_(group["eps"][0])  # in a copy, if there is one
    if "exp_avg_sq_row" in state:
        C, D = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        add_(C.mul_(beta2), over.mean(squares, -1), 1 - beta2)
        add_(D.mul_(beta2), over.mean(squares, -2), 1 - beta2)
        size = over.mean(C.unsqueeze(-1), -2)
        N = torch.mul((C / size).rsqrt_().unsqueeze(-1), D.unsqueeze(-2).rsqrt(), out=squares)
    else:
        N = add_(state["exp_avg_sq"].mul_(beta2), squares, 1 - beta2).rsqrt()
    N.mul_(gradient)
    return N.div_((over.rms(N) / group["clip_threshold"]).clamp_(min=1.0)), 1.0


ADAM = Rule(check_adam, adam_specs, adam, together=adam_together, in_place=adamw_in_place)
TORCH_ADAM = Rule(
    check_adam,
    adam_specs,
    partial(adam, torch_eps=True),
    decay_first=True,
    together=partial(adam_together, torch_eps=True),
    in_place=partial(adamw_in_place, torch_eps=True),
)
LION = Rule(check_lion, lion_specs, lion, decay_first=True, together=lion_together)
ADAFACTOR = Rule(check_adafactor, adafactor_specs, adafactor, decay_first=True, needs_rows=True)
