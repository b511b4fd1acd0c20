"""SR-STE: sparse-refined straight-through estimation, of N:M weights.  Zhou et al. 2021, arXiv:2102.04010.

For a matrix W whose layer computes with W * P, P = 1 at the N largest |W| of every M consecutive entries of a row:

    G    =  the gradient of W * P, straight through to all of W             the layer's (``NMLinear``)
    G    <- G + lam * (1 - P) * W                                           what is pruned is pulled to zero
    W    <- W - lr * decay * W
    W    <- W - lr * Adam(G)

Masks then change less from step to step. The pull passes through the moments, as in the authors' code, whose optimizer
is SGD; Adam divides it by sqrt(V). ``decoupled`` takes it out of there: W <- W - lr * lam * (1 - P) * W, beside decay.
Departure from the authors' code: the pull is added here and not in the layer's backward pass, where accumulated
gradients would have it several times, and a loss scale would multiply it. Where an engine keeps weights in 16 bits and
masters in fp32, P here is the masters': layers see equals where these differ by less than a rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import Check, flag, number
from ..core.types import Group, ParamStep, State
from ..distributed import FullShard
from .lots import Lot, move_by_rule_
from .nm_optimizer import NMOptimizer

PARTS = 8


class SRSTEAdamW(NMOptimizer):
    """AdamW with SR-STE's pull of pruned weights to zero (arXiv:2102.04010).

    Masks are those of ``gracile.models.layers.NMLinear``, whose n and m the groups must have too.

    Args:
        params: parameters, named parameters or groups; a group with an ``n`` holds matrices only, with ``n=None``
            anything: plain AdamW.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        n, m: of every m consecutive weights of a row, n are kept.
        transposed_experts: of experts that are stored as E x in x out (gpt-oss): of every m consecutive weights of a
            column; where each process has whole experts, as with FSDP2.
        sr_lambda: strength of the pull: this share of a pruned weight is added to its gradient.
        decoupled: apply the pull to the weights, as decoupled decay is, and not through the moments.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: ``2 * m * n`` elements and a counter, as AdamW.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key, a value out of range, or a parameter
            that a group with an ``n`` cannot hold.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.models.convert import convert
        >>> from gracile.models.layers import NMLinear
        >>> from gracile.optim import SRSTEAdamW, param_groups
        >>> model = convert(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), NMLinear, ["0"], n=2, m=4)
        >>> optimizer = SRSTEAdamW(param_groups(model, target_modules=["0"], n=2, m=4), lr=0.01)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> int(model[0].weight.count_nonzero()), int(model[0].merge().weight.count_nonzero())  # trained, and used
        (2048, 1024)
    """

    checks: ClassVar[Mapping[str, Check]] = {"sr_lambda": number(">= 0"), "decoupled": flag()}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        n: int | None = 2,
        m: int = 4,
        sr_lambda: float = 2e-4,
        decoupled: bool = False,
        transposed_experts: bool = False,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def needs_mask(self, item: ParamStep) -> bool:
        return True

    def update(self, G: Tensor, shard: FullShard, group: Group, state: State) -> None:
        if group["n"] is None:
            super().update(G, shard, group, state)
            return
        lr, lam, decoupled = group["lr"], group["sr_lambda"], group["decoupled"]
        pruned = self.mask(shard, group).logical_not_()
        # some rows at a time: the regularised gradient and the direction would be two matrices more
        parts = (shard.parameter, G, pruned, state["exp_avg"], state["exp_avg_sq"])
        for W, own, gone, M, V in zip(*(tensor.chunk(PARTS) for tensor in parts), strict=True):
            pull = lam * (W * gone)
            refined = own if decoupled else own.to(M.dtype) + pull
            moments = {"step": state["step"], "exp_avg": M, "exp_avg_sq": V}
            N, correction = self.rule.direction(refined, moments, group)
            W.mul_(1 - lr * group["weight_decay"])
            if decoupled:
                W.sub_(pull, alpha=lr)
            W.add_(N, alpha=-lr * correction)

    def move_lot(self, lot: Lot) -> None:
        group, weights = lot.group, lot.weights
        sizes = torch.cat(weights).abs_()
        pull = sizes.copy_(self.mask_of_sizes(sizes, group).logical_not_())  # in their memory, for one lot has no more
        torch._foreach_mul_(lot.parts(pull), weights)
        pull.mul_(group["sr_lambda"])
        if group["decoupled"]:
            move_by_rule_(lot, self, lot.gradients)
            torch._foreach_sub_(weights, lot.parts(pull), alpha=group["lr"])
            return
        refined = lot.parts(pull.to(lot.held("exp_avg")[0].dtype))
        torch._foreach_add_(refined, list(lot.gradients))
        move_by_rule_(lot, self, refined)
