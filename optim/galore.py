"""GaLore: Adam in a periodically refreshed low-rank gradient subspace.  Zhao et al. 2024, arXiv:2403.03507.

For a matrix W (m x n) with gradient G, the picture for m >= n (``right``; transpose it for ``left``):

    every T steps    P  <-  r leading right singular vectors of G             n x r    subspace
                     R   =  G P                                               m x r    project
                     M  <-  b1 M + (1 - b1) R                                 m x r    rule: Adam, its moments
                     V  <-  b2 V + (1 - b2) R * R                             m x r    kept across refreshes
                     N   =  M / (sqrt(V) + eps)
                     W  <-  W - lr * sqrt(1 - b2^t) / (1 - b1^t) * scale * N P^T
                     W  <-  W - lr * decay * W

The residual, G - G P P^T, is dropped. This is the arithmetic of the authors' ``galore-torch``, which differs from
the paper in three places: eps is 1e-6, not 1e-8; the moments are not overwritten by their corrected values; the
clock starts at t = 0 before the increment, so the first step always finds a subspace.

Departures from the authors' code: moments are fp32 at least (``state_dtype`` restores the parameter's dtype; bf16
second moments stall); the side is decided once from the shape, not from the projected gradient's, which is ambiguous
at full rank; P is a tensor in ``state``, not a pickled object; a non-finite gradient keeps the old P.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .base import Group, State, SubspaceOptimizer
from .rules import LION
from .shards import WholeMatrix
from .subspaces.basis import Lifted


class _GaLore(SubspaceOptimizer):
    """The loop above with any rule."""

    def direction(self, shard: WholeMatrix, group: Group, state: State) -> tuple[Tensor | Lifted, float]:
        G, P = shard.grad, shard.basis(state)
        R = P.project(G)
        N, correction = self.rule.direction(R, state, group)
        return group["scale"] * P.lift(N), correction


class GaLoreAdamW(_GaLore):
    """AdamW whose moments live in the leading singular subspace of each matrix's gradient (arXiv:2403.03507).

    A drop-in for ``galore_torch.GaLoreAdamW``: groups with a ``rank`` are projected, the others get plain AdamW.
    ``gracile.optim.param_groups`` makes such groups from a model.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim.AdamW``.
        lr: learning rate; a projected matrix moves by ``lr * scale``.
        betas, eps: Adam's. ``eps`` is added before the bias correction, unlike in ``torch.optim.AdamW``.
        weight_decay: decoupled, applied after the step with the plain ``lr``.
        rank: r, the number of singular directions kept; None leaves a group unprojected. Capped at min(m, n).
        update_proj_gap: T, steps between refreshes of the subspace.
        scale: factor on the projected update (the paper's alpha).
        proj_type: which side P replaces: ``std`` the shorter, ``reverse_std`` the longer, ``left``, ``right``.
        subspace_method: ``svd``, the authors' exact one, or ``iterate``, one warm-started orthogonal iteration a
            refresh: a small part of the cost, and coordinates that move little.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.

    State of an m x n matrix: ``(r * short + 2 * r * long)`` elements and a counter, against AdamW's ``2 * m * n``.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or for a ranked matrix this process holds only a part of.
    """

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
        subspace_method: str = "svd",
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "subspace_method": subspace_method,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)


class GaLoreLion(_GaLore):
    """Lion whose moment lives in the leading singular subspace of each matrix's gradient.

    The sign is taken of the coordinates, so the entries of a lifted update are no longer of equal size. Groups without
    a ``rank`` get plain ``Lion``. Weights decay before the step, as Lion has it. Arguments as for ``GaLoreAdamW``;
    Lion wants a learning rate 3 to 10 times smaller and a decay as much larger.

    State of an m x n matrix: ``r * short + r * long`` elements and a counter.
    """

    rule = LION

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        subspace_method: str = "svd",
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "subspace_method": subspace_method,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)
