"""Weights that a mask took in later than others, each with an age of its own (SMET, arXiv:2606.00888).

    a     =  t - born                                             steps since a weight was grown; t for the first ones
    M, V  <- Adam's moments, zero when it was grown
    N     =  M / (sqrt(V) + eps sqrt(1 - b2^a)) * sqrt(1 - b2^a) / (1 - b1^a)
    N     <- N * min(1, a / W)                                    ``grown_warmup``, of grown weights alone

With the matrix's counter in place of a, a weight that is grown late moves by 3 to 7 learning rates at first: its second
moment is near zero, and nothing corrects that any more.

Departures from the authors' code: the first update has age 1 and not 2; the warm-up scales the step and not the stored
first moment, where its factors compound; the weights of a first mask have none.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..core.clock import steps_of
from ..core.types import Group, State
from ..state.spec import INDICES, Coordinates, StateSpec
from .mask_state import Packed
from .top_k import AT_ONCE

GROWN_STEPS = ("shared", "own")
BORN = "born"  # the matrix's counter when a weight was grown


def born_spec(by_element: Coordinates, codec: Packed) -> StateSpec:
    return replace(by_element.spec(BORN, torch.int32), kind=INDICES, codec=codec)


def aged_adam(gradient: Tensor, state: State, group: Group) -> Tensor:
    """The direction of a mask's weights (K), times its correction; moments are updated in place."""
    beta1, beta2 = group["betas"]
    M, V, born = state["exp_avg"], state["exp_avg_sq"], state[BORN]
    N = torch.empty_like(M)
    for begin in range(0, len(M), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        R, m, v = gradient[part].to(M.dtype), M[part], V[part]
        m.mul_(beta1).add_(R, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(R, R, value=1 - beta2)
        age = (steps_of(state) - born[part]).to(torch.promote_types(M.dtype, torch.float32))
        root = _one_minus_power(beta2, age).sqrt_()
        step = m / (v.sqrt().add_(root, alpha=group["eps"]))
        step.mul_(root.div_(_one_minus_power(beta1, age)))
        if group["grown_warmup"]:
            risen = age.div_(group["grown_warmup"]).clamp_(max=1.0)
            step.mul_(torch.where(born[part] > 0, risen, 1.0))
        N[part] = step
    return N


def _one_minus_power(beta: float, age: Tensor) -> Tensor:
    """1 - beta^age, also where that is nearly zero."""
    if beta == 0:
        return torch.ones_like(age)
    return torch.expm1(age * math.log(beta)).neg_()
