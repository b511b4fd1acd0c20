"""GaLore: Adam in a periodically refreshed low-rank gradient subspace.  Zhao et al. 2024, arXiv:2403.03507.

For a matrix W (m x n) with gradient G, the picture for m >= n (``right``; transpose it for ``left``):

    every T steps    P  <-  r leading right singular vectors of G             n x r    subspace
                     R   =  G P                                               m x r    project
                     M  <-  b1 M + (1 - b1) R                                 m x r    rule: Adam, its moments
                     V  <-  b2 V + (1 - b2) R * R                             m x r    kept across refreshes
                     N   =  M / (sqrt(V) + eps)
                     W  <-  W - lr * sqrt(1 - b2^t) / (1 - b1^t) * scale * N P^T
                     W  <-  W - lr * decay * W

The residual, G - G P P^T, is dropped. With ``subspace_method="svd"`` this is, to the bit, the arithmetic of the
authors' ``galore-torch``, which differs from the paper in three places: eps is 1e-6, not 1e-8; the moments are not
overwritten by their corrected values; the clock starts at t = 0 before the increment, so the first step always finds a
subspace.

Departures from the authors' code: the default finds P by one orthogonal iteration from the previous P, which holds
nearly the same energy, in another subspace (an overlap of 0.85 to 0.88 where it was measured), and trains to nearly the
same loss at a small part of the cost, and whose columns do not change sign when a sum is rounded another way
(``benchmarks/RESULTS.md``); moments are fp32 at least
(``state_dtype`` restores the parameter's dtype; bf16 second moments stall); the side is decided once from the shape,
not from the projected gradient's, which is ambiguous at full rank; P is a tensor in ``state``, not a pickled object;
a non-finite gradient keeps the old P.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..core.batches import Direction
from ..core.keywords import ACCEPTED, OF_Q_GALORE, Accepted
from ..core.rules import ADAFACTOR, LION
from ..core.types import Group, ParamStep, State
from ..distributed import FullMatrix, FullShard, has_subspace
from ..numbers import Number, count_of, decay_of, least_of, root_of
from .optimizer import LowRankOptimizer
from .published import Published


class GaLore(LowRankOptimizer):
    """The loop above with any rule; the classes below choose it."""

    accepted: ClassVar[Mapping[str, Accepted]] = {**ACCEPTED, **OF_Q_GALORE}
    later_keys: ClassVar[Mapping[str, Any]] = {**LowRankOptimizer.later_keys, "refreshes_at_once": None}

    captures = True
    keeps_coordinates = True
    moves_together = True
    stack_copies = 1
    few_kernels = True
    spends_coordinates = True

    def low_rank_direction(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Direction:
        P = self.basis(shard, group, state)
        N, correction = yield P.project(G), state
        return group["scale"] * P.lift(N), correction


class GaLoreAdamW(GaLore):
    """AdamW whose moments live in the leading singular subspace of each matrix's gradient (arXiv:2403.03507).

    A drop-in for ``galore_torch.GaLoreAdamW``: groups with a ``rank`` are projected, the others get plain AdamW.
    ``gracile.optim.param_groups`` makes such groups from a model.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim.AdamW``.
        lr: learning rate; a projected matrix moves by ``lr * scale``.
        betas: decay rates of Adam's first and second moment.
        eps: Adam's; added before the bias correction, unlike in ``torch.optim.AdamW``.
        weight_decay: decoupled, applied after the step with the plain ``lr``.
        rank: r, the number of singular directions kept; None leaves a group unprojected. Capped at min(m, n).
        update_proj_gap: T, steps between refreshes of the subspace.
        scale: factor on the projected update (the paper's alpha).
        proj_type: which side P replaces: ``std`` the shorter, ``reverse_std`` the longer, ``left``, ``right``.
        subspace_method: ``iterate``, one warm-started orthogonal iteration a refresh, or ``svd``, the authors' exact
            singular vectors.
        shard_basis: where a matrix is split over processes (ZeRO, FSDP2), each process stores a part of P, and the
            parts are gathered when P is used; False stores all of P on each. None: True from 8 processes on.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.
        refreshes_at_once: how many of a group's matrices get a new subspace in one step, in turns; None: all of them.
            The first ones are found in the first step, of all. Where gradients are freed (``release_gradients``), as
            many are kept whole.
        torch_keywords: ``maximize``, as for ``torch.optim.AdamW``; ``stochastic_rounding`` of bf16 weights and moments,
            by noise of ``rounding_seed``; ``capturable``, for steps in a CUDA graph; and what ``torch.optim`` and the
            authors' classes take beside these, at the values that change nothing (``foreach=None``,
            ``correct_bias=True``); others are refused with the reason.

    State of an m x n matrix: ``(r * short + 2 * r * long)`` elements and a counter, against AdamW's ``2 * m * n``.
    ``short`` and ``long`` are the smaller and the larger of m and n with ``proj_type="std"``; in general, the side that
    P replaces and the other side.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import GaLoreAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> {key: tuple(tensor.shape) for key, tensor in optimizer.state[model[0].weight].items()}
        {'step': (), 'basis': (32, 4), 'exp_avg': (4, 64), 'exp_avg_sq': (4, 64)}

        Bytes of state for a larger matrix, with a rank and, without one, as AdamW:

        >>> GaLoreAdamW.state_bytes_for((4096, 4096), rank=128), GaLoreAdamW.state_bytes_for((4096, 4096))
        (6291460, 134217732)
    """

    renamed: ClassVar[Mapping[str, str]] = {"alpha": "scale"}  # of the groups that Fira's authors give GaLore
    published = Published("galore-torch")

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
        shard_basis: bool | None = None,
        state_dtype: torch.dtype | None = None,
        refreshes_at_once: int | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())


class GaLoreLion(GaLore):
    """Lion whose moment lives in the leading singular subspace of each matrix's gradient (arXiv:2403.03507).

    The sign is taken of the coordinates, so the entries of the whole update are not of equal size. Groups without
    a ``rank`` get plain ``Lion`` (arXiv:2302.06675). Against GaLoreAdamW, use a learning rate 3 to 10 times smaller and
    a decay as much larger.

    Args:
        params, lr, rank, update_proj_gap, scale, proj_type, subspace_method, shard_basis, state_dtype,
            refreshes_at_once: as for ``GaLoreAdamW``.
        betas: of the interpolation whose sign is taken, and of the moment.
        weight_decay: decoupled, applied before the step, as in Lion.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: ``r * short + r * long`` elements and a counter.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import GaLoreLion, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> optimizer = GaLoreLion(param_groups(model, rank=4, target_modules="all-linear"), lr=1e-3)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> {key: tuple(tensor.shape) for key, tensor in optimizer.state[model[0].weight].items()}
        {'step': (), 'basis': (32, 4), 'exp_avg': (4, 64)}
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
        subspace_method: str = "iterate",
        shard_basis: bool | None = None,
        state_dtype: torch.dtype | None = None,
        refreshes_at_once: int | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())


class GaLoreAdafactor(GaLore):
    """Adafactor in the leading singular subspace of each matrix's gradient (arXiv:2403.03507).

    A drop-in for ``galore_torch.GaLoreAdafactor``: the second moment of the r x long projected gradient is stored as
    r + long sums. Groups without a ``rank`` get plain Adafactor (Shazeer & Stern 2018, arXiv:1804.04235).

    Args:
        params, rank, update_proj_gap, scale, proj_type, subspace_method, shard_basis, state_dtype, refreshes_at_once:
            as for ``GaLoreAdamW``.
        lr: learning rate; None where ``relative_step`` finds one. LR schedulers need a number.
        eps: two numbers: added to squared gradients; and the smallest root mean square of weights that
            ``scale_parameter`` multiplies by.
        clip_threshold: the largest root mean square of an update, before the learning rate.
        decay_rate: b2 at step t is 1 - t^decay_rate.
        beta1: of a first moment of the projected update; None keeps none.
        weight_decay: decoupled, applied before the step, times the learning rate that the step has.
        scale_parameter: multiply the learning rate by the root mean square of the weights.
        relative_step: find the learning rate from the step t: min(1e-2, 1 / sqrt(t)). Then ``lr`` must be None.
        warmup_init: with ``relative_step``, a learning rate that rises from zero: min(1e-6 * t, 1 / sqrt(t)).
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: P and ``r + long`` numbers, with ``beta1`` also ``r * long``, and a counter.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import GaLoreAdafactor, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> optimizer = GaLoreAdafactor(param_groups(model, rank=4, target_modules="all-linear"))
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> {key: tuple(tensor.shape) for key, tensor in optimizer.state[model[0].weight].items()}
        {'step': (), 'basis': (32, 4), 'exp_avg_sq_row': (4,), 'exp_avg_sq_col': (64,)}
    """

    rule = ADAFACTOR
    few_kernels = False
    published = Published("galore-torch", derived=("RMS",))

    def __init__(
        self,
        params: ParamsT,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        subspace_method: str = "iterate",
        shard_basis: bool | None = None,
        state_dtype: torch.dtype | None = None,
        refreshes_at_once: int | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def stack_numbers(self, item: ParamStep) -> int:
        shard = item.shard
        if len(shard.shape) == 1 and not shard.split:
            return 4 * shard.parameter.numel()
        return super().stack_numbers(item)

    def update(self, G: Tensor, shard: FullShard, group: Group, state: State) -> None:
        lr = self._learning_rate(shard, group, state)
        P = self.basis(shard, group, state) if has_subspace(shard) else None
        N, _ = self.rule.direction(P.project(G) if P else G, state, group, shard)
        N.mul_(lr)
        if group["beta1"] is not None:  # averages whole steps, their learning rates too
            N = state["exp_avg"].mul_(group["beta1"]).add_(N, alpha=1 - group["beta1"])
        decay = decay_of({**group, "lr": lr})
        update = group["scale"] * P.lift(N) if P else N
        del N  # which may be wider
        shard.write(update, 1.0, decay, self.rule.decay_first)

    def _learning_rate(self, shard: FullShard, group: Group, state: State) -> Number:
        lr: Number = group["lr"]
        if group["relative_step"]:
            t = count_of(state, group)
            lr = least_of(1 / root_of(t), 1e-6 * t if group["warmup_init"] else 1e-2)
        if not group["scale_parameter"]:
            return lr
        return shard.weight_rms().clamp_(min=group["eps"][1]) * lr
