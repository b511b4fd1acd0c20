"""Fira: full-rank training under a low-rank memory budget.  Chen et al. 2024, arXiv:2410.01623.

For a matrix W (m x n) with gradient G, the picture for m >= n (``right``; transpose it for ``left``):

    every T steps    P  <-  r leading right singular vectors of G             n x r    subspace
                     R   =  G P                                               m x r    project
                     N   =  Adam(R), without its bias correction              m x r    rule, moments kept
                     f_j =  |N_j| / (|R_j| + 1e-8)                  for each of the m rows j
                     S   =  f_j * (G - scale * R P^T)_j                       m x n    residual: norm-based scaling
                     S  <-  S / max(|S| / |S_previous|, growth) * growth               residual: growth limiter
                     W  <-  W - lr * sqrt(1 - b2^t) / (1 - b1^t) * (scale * N P^T + S)
                     W  <-  W - lr * decay * W

With ``subspace_method="svd"`` this is the arithmetic of the authors' ``fira``. Two of its choices differ from a plain
reading of the paper and are options here. The residual subtracts the SCALED projection, so that (1 - scale) of the
projected gradient leaks into S: ``residual="orthogonal"`` subtracts R P^T. The limiter compares norms without bias
correction, which throttles S to about half around step 10: ``limit_after_bias_correction=True`` compares corrected
ones.

Departures: as in ``galore.py``; the norms run along the projected axis by the side, not by comparing lengths, which
is wrong at full rank; a vanishing norm is not stored as the one to grow from; the host reads no norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import Check, flag, number, one_of
from ..core.batches import Direction
from ..core.types import Group, State
from ..distributed import Block, BlockedUpdate, FullMatrix, LowRankUpdate, block_of
from ..numbers import Number
from ..state.spec import StateSpec, wide_dtype
from .growth_limiter import limit_growth_, limited_in_blocks
from .optimizer import LowRankOptimizer
from .published import Published

RESIDUALS = ("reference", "orthogonal")


class FiraAdamW(LowRankOptimizer):
    """GaLore's AdamW plus the rest of the gradient, scaled by norms and limited in growth (arXiv:2410.01623).

    The counterpart of ``fira.FiraAdamW``. Groups without a ``rank`` get plain AdamW.

    Args:
        params, lr, betas, eps, weight_decay, rank, update_proj_gap, proj_type, subspace_method, shard_basis,
            state_dtype: as for ``GaLoreAdamW``.
        scale: factor on the projected update, not on the residual. The authors' groups call it alpha.
        growth: the norm of the residual grows by at most this factor a step (the paper's gamma).
        residual: ``reference`` subtracts the scaled projection, as the authors' code does; ``orthogonal`` all of it.
        limit_after_bias_correction: let the limiter see bias-corrected norms.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: that of ``GaLoreAdamW`` and one number, the residual's last norm.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import FiraAdamW
        >>> weight = nn.Parameter(torch.zeros(32, 64))
        >>> optimizer = FiraAdamW([{"params": [weight], "rank": 4}], lr=0.01)
        >>> weight.grad = torch.randn(32, 64)
        >>> optimizer.step()
        >>> int(torch.linalg.matrix_rank(weight.detach()))  # GaLoreAdamW's update would have rank 4
        32
    """

    checks: ClassVar[Mapping[str, Check]] = {
        "growth": number(">= 1"),
        "residual": one_of(*RESIDUALS),
        "limit_after_bias_correction": flag(),
    }

    captures = True
    stack_copies = 1
    renamed: ClassVar[Mapping[str, str]] = {"alpha": "scale"}  # of their groups
    published = Published("fira", scale="alpha", renamed={"residual_norm": "scaling_grad"})

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        subspace_method: str = "iterate",
        growth: float = 1.01,
        residual: str = "reference",
        limit_after_bias_correction: bool = False,
        shard_basis: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def basis_specs(self, shard: FullMatrix, group: Group) -> list[StateSpec]:
        norm = StateSpec("residual_norm", (), wide_dtype(shard))  # one number: never worth rounding
        return [*super().basis_specs(shard, group), norm]

    def low_rank_direction(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Direction:
        P = self.basis(shard, group, state)
        R = P.project(G)
        N, correction = yield R, state
        f = P.line_norms(N) / (P.line_norms(R) + 1e-8)
        subtracted = group["scale"] if group["residual"] == "reference" else 1.0
        if shard.in_blocks(twice=True):
            factor: Number = correction if group["limit_after_bias_correction"] else 1.0
            missed = _missed_in_blocks(G, -subtracted * P.lift(R), f)
            S_of = limited_in_blocks(missed, shard, state["residual_norm"], group["growth"], factor)
            lifted = group["scale"] * P.lift(N)
            return BlockedUpdate(G.shape, lambda block: block_of(lifted, block).add_to_(S_of(block))), correction
        S = (-subtracted * P.lift(R)).added_to(G, out=shard.spare(G)).mul_(f)
        if group["limit_after_bias_correction"]:
            limit_growth_(S.mul_(correction), shard, state["residual_norm"], group["growth"])
            S.div_(correction)
        else:
            limit_growth_(S, shard, state["residual_norm"], group["growth"])
        (group["scale"] * P.lift(N)).add_to_(S)
        return S, correction


def _missed_in_blocks(G: Tensor, taken: LowRankUpdate, f: Tensor) -> Callable[[Block], Tensor]:
    """What makes S, not limited yet, in blocks."""
    return lambda block: block_of(taken, block).added_to(block.of(G)).mul_(block.of(f))
