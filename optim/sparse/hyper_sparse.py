"""HyperSparse and ART: AdamW with a growing pull on small weights, then pruning once.  Glandorf et al. 2023,
arXiv:2308.07163.

All matrices of a group are one vector w of N weights, of which the share kappa shall go; step t = 0, 1, ...

    s     =  atanh(1 / sqrt 3) / q,   q = the ceil(kappa N)-th smallest |w|          tanh bends most at q
    h_i   =  tanh(s |w_i|)
    R_i   =  sign(w_i) s (1 - h_i^2) * (the sum of |w|) / (the sum of h)              the penalty's gradient
    lam   =  hs_lambda * hs_growth^e,   e = floor((t - warmup_steps) / interval)      from warmup_steps on
    w     <- AdamW(G + lam R)
    then, at prune_at or when ``finish`` is called: the floor(kappa N) smallest |w| become zero, and stay it

R pulls at weights below q and leaves large ones alone. The penalty's value is identically 0: nothing to log.

Departures from the authors' code: s and the quotient of the sums are found every ``quantile_every`` steps, by
histograms, where theirs sorts all weights in every step; exactly floor(kappa N) weights are pruned, ties kept from the
lowest index on, where theirs drops all that tie; q is 1e-12 at least; pruned are the weights of that moment, not ones
remembered from an earlier one; AdamW for SGD, whose moments go on after the pruning; gradients are clipped before the
penalty is added. ``train.art`` decides when to prune, as ART does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...fp64 import widest
from ...validation import Check, number, whole
from ..core import batches
from ..core.clock import every, steps_of
from ..core.group_checks import check_contiguous
from ..core.optimizer import FIND
from ..core.rules import TORCH_ADAM
from ..core.types import Group, ParamStep, State
from ..distributed import FullShard, UnsupportedLayout
from ..state.spec import StateSpec
from .frozen_zeros import adamw_
from .lots import Lot, MovedInLots, adamw_lot_
from .prune_smallest import nth_smallest, prune_smallest_, summed_up, value_of
from .top_k import AT_ONCE

BEND = math.atanh(1 / math.sqrt(3))
LEAST = 1e-12  # of the quantile: half of a model may be zero


class HyperSparseAdamW(MovedInLots):
    """AdamW with a growing penalty on small weights of groups with a ``sparsity``, then pruning (arXiv:2308.07163).

    Args:
        params: parameters, named parameters or groups; a group with a ``sparsity`` is one vector, of which it is the
            share that is pruned. Others get plain AdamW.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        sparsity: kappa, from 0 to 1; None for no pruning.
        hs_lambda: strength of the penalty at first.
        hs_growth: factor on it after each interval.
        interval: steps between two increases of the penalty.
        warmup_steps: steps without a penalty.
        prune_at: steps after which to prune; None waits for ``finish``.
        quantile_every: steps between new quantiles and sums.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: ``2 * m * n`` elements, and four numbers. Pruned weights are known by being zero.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or (UnsupportedLayout) where an engine steps a group in parts.

    Example:
        >>> from torch import nn
        >>> from gracile.optim import HyperSparseAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> groups = param_groups(model, sparsity=0.9, target_modules="all-linear")
        >>> optimizer = HyperSparseAdamW(groups, lr=0.01, prune_at=2)
        >>> for _ in range(3):
        ...     model(torch.randn(16, 64)).square().mean().backward()
        ...     optimizer.step()
        ...     print(sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2])), "of 2304 are zero")
        0 of 2304 are zero
        2073 of 2304 are zero
        2073 of 2304 are zero
    """

    rule = TORCH_ADAM
    matrix_key = "sparsity"
    together = "the matrices of a group"
    checks: ClassVar[Mapping[str, Check]] = {
        "sparsity": number("in [0, 1)", optional=True),
        "hs_lambda": number(">= 0"),
        "hs_growth": number("> 0"),
        "interval": whole(1),
        "quantile_every": whole(1),
        "warmup_steps": whole(0),
        "prune_at": whole(1, optional=True),
    }
    _measured: Mapping[int, int] = {}  # of each group the step that its sums were last taken for

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        sparsity: float | None = None,
        hs_lambda: float = 5e-6,
        hs_growth: float = 1.05,
        interval: int = 100,
        warmup_steps: int = 0,
        prune_at: int | None = None,
        quantile_every: int = 100,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def check_parameters(self, parameters: Sequence[Tensor], group: Group) -> None:
        if group["sparsity"] is not None:
            check_contiguous(parameters)

    def state_specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        specs = super().state_specs(shard, group)
        if group["sparsity"] is None:
            return specs
        return [*specs, StateSpec("sharpness", ()), StateSpec("quotient", ()), StateSpec("pruned", (), on_host=True)]

    def forget(self) -> None:
        super().forget()
        self._measured = {}

    # ---- a step -------------------------------------------------------------------------------------------------

    def find(self, work: list[ParamStep]) -> None:
        """s and the quotient of the sums, for groups that are due: once, before the first of their weights moves."""
        for group in self._squeezed(work):
            after = self._steps(work, group) - group["warmup_steps"]
            number = group["group_number"]
            if after >= 0 and every(group["quantile_every"], after) and not self.is_pruned(group):
                if self._measured.get(number) == after:
                    continue
                self._measured = {**self._measured, number: after}
                with self.phase(FIND):
                    self._measure(group)

    def update(self, G: Tensor, shard: FullShard, group: Group, state: State) -> None:
        if group["sparsity"] is None:
            super().update(G, shard, group, state)
        elif (lam := self._strength(group, state)) == 0:
            adamw_(shard, group, state, hold=_was_pruned(state))
        else:

            def penalised(W: Tensor, own: Tensor) -> Tensor:
                return penalty_gradient(W, state["sharpness"], state["quotient"]).mul_(lam).add_(own)

            adamw_(shard, group, state, penalised)

    def is_plain(self, group: Group, state: State) -> bool:
        return self._strength(group, state) == 0 and not _was_pruned(state)

    def move_lot(self, lot: Lot) -> None:
        group, state = lot.group, lot.items[0].state  # all of a group have the same numbers
        lam, gradient = self._strength(group, state), None
        if lam:
            gradient = penalty_gradient(torch.cat(lot.weights), state["sharpness"], state["quotient"]).mul_(lam)
            torch._foreach_add_(lot.parts(gradient), list(lot.gradients))
        adamw_lot_(self, lot, gradient, hold=_was_pruned(state))

    def after_step(self, work: list[ParamStep]) -> None:
        for group in self._squeezed(work):
            states = [item.state for item in work if _same(item.group, group)]
            late = group["prune_at"] is not None and self._steps(work, group) >= group["prune_at"]
            if late and not any(map(_was_pruned, states)):
                with self.phase(FIND):
                    self._prune(group)

    def _strength(self, group: Group, state: State) -> float:
        after = steps_of(state) - 1 - group["warmup_steps"]
        if after < 0 or _was_pruned(state):
            return 0.0
        return float(group["hs_lambda"] * group["hs_growth"] ** (after // group["interval"]))

    # ---- groups as one vector -----------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self) -> None:
        """Prune all groups with a ``sparsity`` that are not pruned yet, after the first step. Collective.

        Where an engine keeps weights of its own, the model has them after the next step.
        """
        for group in self.param_groups:
            if group["sparsity"] is not None and not self.is_pruned(group):
                self._prune(group)

    def is_pruned(self, group: Group) -> bool:
        return any(_was_pruned(state) for _, state in self._held(group))

    def _squeezed(self, work: list[ParamStep]) -> list[Group]:
        found = {item.group["group_number"]: item.group for item in work if item.group["sparsity"] is not None}
        return list(found.values())

    def _steps(self, work: list[ParamStep], group: Group) -> int:
        """How often the group's matrices moved; those without gradients stay behind."""
        return max(steps_of(item.state) for item in work if _same(item.group, group))

    def _held(self, group: Group) -> list[tuple[FullShard, State]]:
        held = []
        for other, tensors in self.stepped_parameters():
            if _same(other, group):
                held += [found for p in tensors if p.requires_grad for found in self.shards_of(p, group)]
        trained = [ref.position for ref in self.registry.of_group(group) if ref.parameter.requires_grad]
        if sorted(ref.position for ref, _, _ in held) != trained:
            raise UnsupportedLayout(
                f"{type(self).__name__} ranks the {len(trained)} parameters of a group together, but {len(held)} of "
                "them are stepped together; under ZeRO 3 raise sub_group_size"
            )
        held.sort(key=lambda found: found[0].position)  # ties go by this order
        return [(shard, state) for _, shard, state in held if "step" in state]

    def _measure(self, group: Group) -> None:
        held = self._held(group)
        shards = [shard for shard, _ in held]
        key, _ = nth_smallest(shards, how_many(shards, group["sparsity"], up=True))
        sharpness = BEND / value_of(key, shards).clamp(min=LEAST)
        sums = summed_up(shards, lambda W: _sums(W, sharpness))
        for _, state in held:
            state["sharpness"].copy_(sharpness)
            state["quotient"].copy_(sums[0] / sums[1].clamp(min=torch.finfo(sums.dtype).tiny))

    def _prune(self, group: Group) -> None:
        held = self._held(group)
        if not held:
            raise RuntimeError("finish comes after the first step: that weights are pruned is remembered in the state")
        shards = [shard for shard, _ in held]
        prune_smallest_(shards, how_many(shards, group["sparsity"]))
        for _, state in held:
            state["pruned"].fill_(1.0)


def how_many(shards: Sequence[FullShard], share: float, up: bool = False) -> Tensor:
    """A share of the weights of all tensors on all processes, rounded down or ``up`` (int64 scalar)."""
    exact = share * sum(math.prod(shard.shape) for shard in shards)
    n = math.ceil(exact - 1e-6) if up else math.floor(exact + 1e-6)
    return torch.tensor(n, device=shards[0].parameter.device)


def penalty_gradient(weights: Tensor, sharpness: Tensor, quotient: Tensor) -> Tensor:
    """R, laid out as ``weights``, in fp32 at least."""
    wide = torch.promote_types(weights.dtype, torch.float32)
    s = sharpness.to(wide)
    h = weights.detach().to(wide, copy=True).mul_(s).tanh_()  # in place from here on
    R = h.square_().neg_().add_(1).mul_(s * quotient.to(wide)).copysign_(weights.detach())
    return R.masked_fill_(weights == 0, 0.0)


def _sums(weights: Tensor, sharpness: Tensor) -> Tensor:
    """The sum of |w| and that of h (2, fp64) of flat weights."""
    sums = torch.zeros(2, dtype=widest(weights.device), device=weights.device)
    for part in torch.split(weights, batches.AT_ONCE if batches.launches_cost(weights.device) else AT_ONCE):
        W = part.to(torch.promote_types(part.dtype, torch.float32)).abs()
        h = torch.tanh(sharpness.to(W.dtype) * W)
        sums += torch.stack([W.sum(dtype=sums.dtype), h.sum(dtype=sums.dtype)])
    return sums


def _same(one: Group, other: Group) -> bool:
    """A step sees a copy of a group with numbers for tensors."""
    return bool(one["group_number"] == other["group_number"])


def _was_pruned(state: State) -> bool:
    return "pruned" in state and bool(state["pruned"].item())  # on the CPU
