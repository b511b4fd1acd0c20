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

Between refreshes weights move on, and a mask cannot be found again: it is state, a bit an entry. lam is less than a
rounding of bf16: keep W in fp32, as masters of engines are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...layer_registry import parts_among
from ...validation import Check, number, whole
from ..core.batches import decay_together
from ..core.clock import every, steps_of
from ..core.optimizer import FIND
from ..core.rules import MOMENTS
from ..core.types import Group, ParamStep, State
from ..distributed import FullShard
from ..state.spec import INDICES, Coordinates, Placement, StateSpec
from .lots import Lot
from .mask_state import Bits, packed_bits, unpacked_bits
from .nm_optimizer import NMOptimizer

PARTS = 8
BYTE = 8  # bits


class CastAdamS(NMOptimizer):
    """AdamS, which makes a dense model's matrices n:m in ``total_steps`` steps (CAST, arXiv:2509.25996).

    Args:
        params: parameters, named parameters or groups; a group with an ``n`` holds matrices only, with ``n=None``
            anything but weights of ``ScaledLinear``: plain Adam.
        lr: learning rate; the paper's 2e-5 is for a model of 7B. It must fall towards the end.
        betas, eps: as for ``torch.optim.AdamW``.
        weight_decay: decoupled, before the step; the paper has none.
        n, m: of every m consecutive weights of a row, n are kept.
        transposed_experts: of experts that are stored as E x in x out (gpt-oss): of every m consecutive weights of a
            column; where each process has whole experts, as with FSDP2.
        total_steps: T, after which masks are applied.
        lam: strength of the pull to zero on weights outside of the mask.
        mask_every: T1, steps between updates of the masks.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: ``2 * m * n`` elements in fp32, m * n bits for the mask, and a counter.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key, a value out of range, a parameter that a
            group with an ``n`` cannot hold, or one that needs a mask and would have none.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import CastAdamS, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> groups = param_groups(model, target_modules=["0"], n=2, m=4)
        >>> optimizer = CastAdamS(groups, lr=1e-3, total_steps=3)
        >>> for _ in range(3):
        ...     model(torch.randn(16, 64)).square().mean().backward()
        ...     optimizer.step()
        >>> (model[0].weight != 0).view(-1, 4).sum(dim=1).unique()  # of every 4 weights
        tensor([2])
    """

    checks: ClassVar[Mapping[str, Check]] = {"lam": number(">= 0"), "mask_every": whole(1)}

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
        transposed_experts: bool = False,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if group["n"] is not None:
            whole(1)("total_steps", group["total_steps"])

    def check_parameters(self, parameters: Sequence[Tensor], group: Group) -> None:
        if group["n"] is None:
            for part in parts_among(parameters).values():
                if part.name == "weight" and getattr(part.layer, "needs_mask", False):
                    raise ValueError(
                        f"the weight of {part.layer} needs a mask, got n=None; put it into a group with an n "
                        "(gracile.optim.param_groups does)"
                    )

    def state_specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        specs = super().state_specs(shard, group)
        if group["n"] is not None:
            mask = Coordinates(shard.shape, Placement.ELEMENTS).spec("mask", torch.uint8)
            specs.append(replace(mask, kind=INDICES, codec=Bits()))
        return specs

    def needs_mask(self, item: ParamStep) -> bool:
        return every(item.group["mask_every"], steps_of(item.state))

    def update(self, G: Tensor, shard: FullShard, group: Group, state: State) -> None:
        if group["n"] is None:
            super().update(G, shard, group, state)
            return
        t = steps_of(state) - 1
        if every(group["mask_every"], t):
            state["mask_bits"].copy_(packed_bits(self.mask(shard, group)))
        beta1, beta2 = group["betas"]
        a = _share(t, group)
        mu, v = state["exp_avg"], state["exp_avg_sq"]
        mu.mul_(beta1).add_(G, alpha=1 - beta1)
        pulled = torch.sign(shard.parameter).to(mu.dtype).mul_(a * group["lam"]).add_(mu, alpha=1 - a)
        P = unpacked_bits(state["mask_bits"], shard.coordinates_shape)
        torch.where(P.view(torch.bool), mu, pulled, out=pulled)
        v.mul_(beta2).addcmul_(pulled, pulled, value=1 - beta2)
        N = _divided_(pulled, v, 1 - beta2 ** (t + 1), group["eps"])
        step_size = group["lr"] / (1 - beta1 ** (t + 1))
        shard.write(N, step_size, group["lr"] * group["weight_decay"], decay_first=True)

    def fits_in_lots(self, item: ParamStep) -> bool:
        return super().fits_in_lots(item) and item.shard.parameter.numel() % BYTE == 0

    def unit(self, group: Group) -> int:
        return math.lcm(group["m"], BYTE)

    def move_lot(self, lot: Lot) -> None:
        group, weights, (mu, v) = lot.group, lot.weights, map(lot.held, MOMENTS)
        bits = [
            item.state["mask_bits"][span.start // BYTE : span.stop // BYTE]
            for item, span in zip(lot.items, lot.spans, strict=True)
        ]
        t, (beta1, beta2) = steps_of(lot.items[0].state) - 1, group["betas"]
        if every(group["mask_every"], t):
            P = packed_bits(self.mask_of_sizes(torch.cat(weights).abs_(), group))
            torch._foreach_copy_(bits, list(torch.split(P, [len(own) for own in bits])))
        a = _share(t, group)
        torch._foreach_mul_(mu, beta1)
        torch._foreach_add_(mu, list(lot.gradients), alpha=1 - beta1)
        averages = torch.cat(mu)
        pulled = torch.cat(weights).sign_().to(averages.dtype).mul_(a * group["lam"]).add_(averages, alpha=1 - a)
        P = unpacked_bits(torch.cat(bits), pulled.shape)
        torch.where(P.view(torch.bool), averages, pulled, out=pulled)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, lot.parts(pulled), lot.parts(pulled), value=1 - beta2)
        root = torch.cat(v, out=averages).sqrt_().div_(math.sqrt(1 - beta2 ** (t + 1))).add_(group["eps"])
        step_size = group["lr"] / (1 - beta1 ** (t + 1))
        decay_together(weights, group)
        torch._foreach_add_(weights, lot.parts(pulled.div_(root)), alpha=-step_size)

    def after_step(self, work: list[ParamStep]) -> None:
        over = [item for item in work if item.group["n"] is not None and _is_over(item)]
        if not over:
            return
        with self.phase(FIND):
            self.complete_groups(over)
            for item in over:
                item.shard.parameter.mul_(self.mask(item.shard, item.group))


def _share(t: int, group: Group) -> float:
    """a: how much of the run is over."""
    return min(1.0, t / float(group["total_steps"]))


def _is_over(item: ParamStep) -> bool:
    return steps_of(item.state) == int(item.group["total_steps"])


def _divided_(mu: Tensor, v: Tensor, correction: float, eps: float) -> Tensor:
    """mu / (sqrt(v / correction) + eps), in place, some rows at a time: all roots would be another matrix."""
    for part, squares in zip(mu.chunk(PARTS), v.chunk(PARTS), strict=True):
        part.div_(squares.sqrt().div_(math.sqrt(correction)).add_(eps))
    return mu
