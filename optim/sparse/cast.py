"""CAST: a dense model becomes N:M while its weights and its masks fit themselves to each other.  arXiv:2509.25996.

For a matrix W (m x n) with gradient G, in step t = 0, 1, ... of T:

    every T1 steps  P    <- 1 at the N largest |W| of every M consecutive entries of a row, else 0
                    a    =  t / T
                    mu   <- b1 mu + (1 - b1) G                                      of all of W, also where P = 0
                    mu~  =  mu where P = 1,   (1 - a) mu + a lam sign(W) where P = 0         AdamS; sign(0) = 0
                    v    <- b2 v + (1 - b2) mu~^2                                   not G^2
                    W    <- W - lr * (mu~ / (1 - b1^(t+1))) / (sqrt(v / (1 - b2^(t+1))) + eps)
    after step T    W    <- W * P, P anew

The forward pass stays dense: ``ScaledLinear``, or any layer. P is taken from the weights that the gradients are of.
Late in a run what P leaves out moves by lr a step, whatever lam is, for sqrt(v) then has lam's own size: the sum of
lr_t * a_t must exceed the sizes of weights, and lr must fall, or what shall be zero keeps swinging about it by lr. As v
averages squares of mu and not of G, the first steps are up to 1 / (1 - b1) times as large as Adam's: warm up.

Sources: the abstract, and a reproduction of the paper. Choices of ours, where these are silent: b2 = 0.999 and eps;
decay, decoupled, for those who want it; beyond step T, a stays 1.

Between refreshes weights move on, and a mask cannot be found again: it is state, a bit an entry, and a byte an entry
where it travels to another layout, for engines do not cut matrices between bytes of bits. lam is less than a rounding
of bf16: keep W in fp32, as masters of engines are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import ParamsT

from ...layer_registry import parts_among
from ...validation import is_real, is_whole, require
from ..core.optimizer import Group, NewState, ParamStep, State
from ..distributed import FullShard
from .nm_optimizer import NMOptimizer

PARTS = 8


class CastAdamS(NMOptimizer):
    """AdamS, which makes a dense model's matrices n:m in ``total_steps`` steps (CAST, arXiv:2509.25996).

    Args:
        params: parameters, named parameters or groups; a group with an ``n`` holds matrices only, with ``n=None``
            anything but weights of ``ScaledLinear``: plain Adam.
        lr: learning rate; the paper's 2e-5 is for a model of 7B. It must fall towards the end.
        betas, eps: as for ``torch.optim.AdamW``.
        weight_decay: decoupled, before the step; the paper has none.
        n, m: how many of every m consecutive entries of a row stay.
        total_steps: T, after which masks are applied.
        lam: size of the pull to zero of what masks leave out.
        mask_every: T1, steps between masks.

    State of an m x n matrix: ``2 * m * n`` elements in fp32, m * n bits for the mask, and a counter.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key, a value out of range, a parameter that a
            group with an ``n`` cannot hold, or one that needs a mask and would have none.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        n: int | None = 2,
        m: int = 4,
        total_steps: int | None = None,
        lam: float = 4e-7,
        mask_every: int = 10,
    ) -> None:
        super().__init__(params, locals())

    def validate(self, group: Group) -> None:
        super().validate(group)
        total, lam, every = group["total_steps"], group["lam"], group["mask_every"]
        if group["n"] is not None:
            require(is_whole(total) and total >= 1, "total_steps must be a whole number >= 1", total)
        require(is_real(lam) and lam >= 0, "lam must be a number >= 0", lam)
        require(is_whole(every) and every >= 1, "mask_every must be a whole number >= 1", every)

    def _check_parameters(self, group: Group) -> None:
        super()._check_parameters(group)
        if group["n"] is None:
            entries = (entry[1] if isinstance(entry, tuple) else entry for entry in group["params"])
            for part in parts_among(entries).values():
                if type(part.layer).__name__ == "ScaledLinear" and part.name == "weight":
                    raise ValueError(
                        f"the weight of {part.layer} needs a mask, got n=None; put it into a group with an n "
                        "(gracile.optim.param_groups does)"
                    )

    def init_state(self, shard: FullShard, group: Group) -> NewState:
        state = super().init_state(shard, group)
        if group["n"] is None:
            return state
        bits = -(-math.prod(shard.coordinates_shape) // 8)
        return state | {"mask_bits": torch.zeros(bits, dtype=torch.uint8, device=shard.parameter.device)}

    def spread_state(self, shard: FullShard, group: Group) -> NewState:
        state = self.new_state(shard, group)
        if group["n"] is None:
            return state
        device = state.pop("mask_bits").device
        return state | {"mask": torch.zeros(shard.coordinates_shape, dtype=torch.uint8, device=device)}

    def spread(self, shard: FullShard, group: Group, state: State) -> Mapping[str, Tensor]:
        if "mask_bits" not in state:
            return state
        rest = {key: value for key, value in state.items() if key != "mask_bits"}
        return rest | {"mask": _unpacked(state["mask_bits"], shard.coordinates_shape)}

    def settled(self, shard: FullShard, group: Group, spread: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if "mask" not in spread:
            return spread
        rest = {key: value for key, value in spread.items() if key != "mask"}
        return rest | {"mask_bits": _packed(spread["mask"])}

    def asks_for_mask(self, work: ParamStep) -> bool:
        return _is_due(int(work.state["step"].item()), work.group)

    def update(self, shard: FullShard, group: Group, state: State) -> None:
        if group["n"] is None:
            super().update(shard, group, state)
            return
        t = int(state["step"].item()) - 1
        if _is_due(t, group):
            state["mask_bits"].copy_(_packed(self.mask(shard, group)))
        beta1, beta2 = group["betas"]
        a = min(1.0, t / group["total_steps"])
        mu, v = state["exp_avg"], state["exp_avg_sq"]
        mu.mul_(beta1).add_(shard.grad, alpha=1 - beta1)
        pulled = torch.sign(shard.parameter).to(mu.dtype).mul_(a * group["lam"]).add_(mu, alpha=1 - a)
        P = _unpacked(state["mask_bits"], shard.coordinates_shape)
        torch.where(P.view(torch.bool), mu, pulled, out=pulled)
        v.mul_(beta2).addcmul_(pulled, pulled, value=1 - beta2)
        N = _divided_(pulled, v, 1 - beta2 ** (t + 1), group["eps"])
        step_size = group["lr"] / (1 - beta1 ** (t + 1))
        shard.write(N, step_size, group["lr"] * group["weight_decay"], decay_first=True)

    def settle(self, work: list[ParamStep]) -> None:
        over = [item for item in work if item.group["n"] is not None and _is_over(item)]
        self.complete_groups(over)
        for shard, group, _ in over:
            shard.parameter.mul_(self.mask(shard, group))


def _is_due(t: int, group: Group) -> bool:
    """Whether masks are found anew in step ``t`` (from 0)."""
    return t % int(group["mask_every"]) == 0


def _is_over(work: ParamStep) -> bool:
    return int(work.state["step"].item()) == int(work.group["total_steps"])


def _divided_(mu: Tensor, v: Tensor, correction: float, eps: float) -> Tensor:
    """mu / (sqrt(v / correction) + eps), in place, some rows at a time: all roots would be another matrix."""
    for part, squares in zip(mu.chunk(PARTS), v.chunk(PARTS), strict=True):
        part.div_(squares.sqrt().div_(math.sqrt(correction)).add_(eps))
    return mu


def _packed(mask: Tensor) -> Tensor:
    """Eight entries of ones and zeros in a byte, the first in its lowest bit (flat, uint8)."""
    entries = functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (entries << _places(mask)).sum(1, dtype=torch.uint8)


def _unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The ones and zeros (uint8) of a mask of ``shape``."""
    entries = (bits.unsqueeze(1) >> _places(bits)).bitwise_and_(1)
    return entries.view(-1)[: math.prod(shape)].view(shape)


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
