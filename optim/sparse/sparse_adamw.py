"""AdamW on a part of each matrix's weights, by any combination of the published choices; optim/sparse/optimizer.py has
the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import Check
from .frozen_weights import CHECKS, KEYS
from .optimizer import SparseOptimizer
from .selected import Selection


class SparseAdamW(SparseOptimizer):
    """AdamW on a part of each matrix's weights, by any combination of the published choices.

    The other weights are zero, or, with ``outside="frozen"``, keep their values.

    Sources: SET (Mocanu et al. 2018), RigL (arXiv:1911.11134), SRigL (arXiv:2305.02299), BLaST (arXiv:2507.03117), MEST
    and SNFS, below. Groups with a ``sparsity`` (or ``density``) hold matrices and are masked, others get plain AdamW;
    ``gracile.optim.param_groups(model, sparsity=0.9)`` makes them. Masks are drawn, and weights outside of them set to
    zero, when the optimizer is built, also of a model that is split already; a matrix that is as sparse as it should be
    keeps its mask. A parameter of three dimensions (E x m x n) is E matrices, the experts of a layer: each has a budget
    and a mask of its own, as E parameters would.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim.AdamW``.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        sparsity: the share of a group's weights that is zero, from 0 to 1; None for plain AdamW.
        density: 1 - sparsity, in its place.
        drop: which weights are dropped: those of the smallest ``magnitude``; of the smallest ``gradient_magnitude``,
            |w| + drop_lambda |g| (MEST: Yuan et al. 2021, arXiv:2110.14032); or ``random`` ones.
        grow: which are grown: those of the largest ``gradient`` (RigL); of the largest ``momentum`` of all gradients
            (SNFS: Dettmers & Zettlemoyer 2019, arXiv:1907.04840), which costs a dense moment; or ``random`` ones (SET).
        distribution: of the weights over a group's matrices: ``uniform``, the same sparsity for each; ``er`` or ``erk``
            (Erdos-Renyi), more of small and narrow matrices; ``lamp`` (arXiv:2010.07611) or ``global``, by magnitudes.
        schedule: how ``drop_fraction`` falls to zero at ``t_end``: ``cosine``, ``cubic``, or ``constant``: not at all.
        structure: ``unstructured``, ``constant_fan_in``: as many weights in every row, or ``block``.
        update_every: steps between changes of the masks.
        drop_fraction: the share of a mask that changes at a time, at first; 0 keeps the first masks.
        t_begin: the step after which masks change.
        t_end: the step up to which they do; RigL's is three quarters of the run. None, without an end, is allowed with
            ``schedule="constant"`` or a ``drop_fraction`` of 0.
        initial_sparsity: where given, sparsity rises from it to ``sparsity`` at ``t_end`` by a cubic.
        init: first masks are ``random``, of the largest ``magnitude``, or, where others are frozen, of the
            ``smallest``; None: random but for lamp and global.
        rescale_init: multiply weights that are masked for the first time by 1 / sqrt(density), as fan-in asks.
        reinit_when_same: a weight that is dropped and grown in one update starts from zero; else it keeps its value.
        grown_step: which steps Adam's bias correction counts for a grown weight: ``shared``, its matrix's, or ``own``,
            those since it was grown (SMET, arXiv:2606.00888), for 4 more bytes a weight. With the matrix's, its first
            updates are several times as large as others'.
        grown_warmup: with ``own``, steps over which the learning rate of a grown weight rises.
        drop_lambda: weight of gradients in ``gradient_magnitude``.
        gamma_sal: of ``constant_fan_in``: a row with a smaller share of salient weights is ablated, whole; None: 0.3.
        block_size: of ``block``: rows and columns of a block; None: 64.
        transposed_experts: of ``constant_fan_in``, as for ``SRigLAdamW``.
        outside: weights outside of masks are ``zero``; or ``frozen``: they keep their values to the bit, are not
            decayed, and one that is grown goes on from its value. ``gracile.selections`` makes such groups.
        selected: with ``outside="frozen"`` and a ``drop_fraction`` of 0, which weights are trained, in place of a
            density: ``Rows``, ``Columns``, ``Entries`` or ``Below`` of ``gracile.selections``, for all parameters of
            the group, or a mapping from each to its own. It becomes the group's density.
        decay_to: weights of a mask decay to ``zero``, or, with ``outside="frozen"``, to what they were at the
            ``start``, for as many more numbers.
        reselect_every: with ``outside="frozen"``, steps after which masks that weights decide (``Below``, or an
            ``init`` of ``smallest`` or ``magnitude``) are chosen anew, and moments and counter begin anew (SaRA).
        seed: of the random numbers.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix that keeps K weights: ``indices`` (int32) and two moments of K elements, and a counter.
    ``grow="momentum"`` adds m * n elements.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import SparseAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> groups = param_groups(model, sparsity=0.75, target_modules="all-linear")
        >>> optimizer = SparseAdamW(groups, lr=0.01, drop="gradient_magnitude", grow="random", schedule="constant")
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> weight = model[0].weight
        >>> int(weight.count_nonzero()), weight.numel(), optimizer.state[weight]["exp_avg"].numel()
        (512, 2048, 512)
        >>> SparseAdamW.state_bytes_for((4096, 4096), sparsity=0.9, t_end=1), SparseAdamW.state_bytes_for((4096, 4096))
        (20132668, 134217732)
    """

    checks: ClassVar[Mapping[str, Check]] = CHECKS
    later_keys: ClassVar[Mapping[str, Any]] = {**SparseOptimizer.later_keys, "transposed_experts": False, **KEYS}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        drop: str = "magnitude",
        grow: str = "gradient",
        distribution: str = "uniform",
        schedule: str = "cosine",
        structure: str = "unstructured",
        update_every: int = 100,
        drop_fraction: float = 0.3,
        t_begin: int = 0,
        t_end: int | None = None,
        initial_sparsity: float | None = None,
        init: str | None = None,
        rescale_init: bool = False,
        reinit_when_same: bool = False,
        grown_step: str = "shared",
        grown_warmup: int = 0,
        transposed_experts: bool = False,
        drop_lambda: float = 1e-3,
        gamma_sal: float | None = None,
        block_size: int | None = None,
        outside: str = "zero",
        selected: Selection | Mapping[Tensor, Selection] | None = None,
        decay_to: str = "zero",
        reselect_every: int | None = None,
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())
