"""SET and RigL: the smallest weights go, and others come, at random or where gradients are largest.

SET: Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse connectivity, Nature
Communications 9:2383.  RigL: Evci et al. 2020, arXiv:1911.11134.

    every update_every steps before t_end, after the step itself:
    n     =  floor(drop_fraction / 2 (1 + cos(pi t / t_end)) K)
    keep  <-  the K - n largest |W| of the mask
    grow  <-  SET: n places outside of keep at random;   RigL: those with the n largest |G|

A place that is dropped and grown at once keeps its weight and moments, as in google-research/rigl;
optim/sparse/optimizer.py has the steps, and where they depart from published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from .optimizer import SparseOptimizer

CHOSEN = {
    "drop": "magnitude",
    "schedule": "cosine",
    "structure": "unstructured",
    "t_begin": 0,
    "initial_sparsity": None,
    "drop_lambda": 0.0,
}


class SETAdamW(SparseOptimizer):
    """Sparse weights: the smallest are dropped, others grow at random (SET: Mocanu et al. 2018).

    The paper is doi:10.1038/s41467-018-04316-3. No dense gradient is needed to choose.
    ``drop_fraction`` falls to zero at ``t_end`` by a cosine.

    Args:
        params, lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        sparsity, density, distribution, update_every, drop_fraction, t_end, init, rescale_init, reinit_when_same,
            grown_step, grown_warmup, seed, state_dtype: as for ``SparseAdamW``.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix that keeps K weights: ``indices`` (int32) and two moments of K elements, and a counter.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import SETAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> groups = param_groups(model, sparsity=0.9, target_modules="all-linear")
        >>> optimizer = SETAdamW(groups, lr=0.01, update_every=100, t_end=750)  # of 1000 steps
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> [int(layer.weight.count_nonzero()) for layer in (model[0], model[2])]  # a tenth of 2048 + 256 weights
        [162, 68]
    """

    fixed: ClassVar[Mapping[str, Any]] = {**CHOSEN, "grow": "random"}

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
        distribution: str = "erk",
        update_every: int = 100,
        drop_fraction: float = 0.3,
        t_end: int | None = None,
        init: str | None = None,
        rescale_init: bool = False,
        reinit_when_same: bool = False,
        grown_step: str = "shared",
        grown_warmup: int = 0,
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())


class RigLAdamW(SparseOptimizer):
    """Sparse weights: the smallest are dropped, others grow where gradients are largest (RigL, arXiv:1911.11134).

    ``drop_fraction`` falls to zero at ``t_end`` by a cosine.

    Args:
        params, lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        sparsity, density, distribution, update_every, drop_fraction, t_end, init, rescale_init, reinit_when_same,
            grown_step, grown_warmup, seed, state_dtype: as for ``SparseAdamW``.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix that keeps K weights: ``indices`` (int32) and two moments of K elements, and a counter.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import RigLAdamW
        >>> layer = nn.Linear(64, 32)
        >>> groups = [{"params": [layer.weight], "sparsity": 0.9}, {"params": [layer.bias]}]
        >>> optimizer = RigLAdamW(groups, lr=0.01, update_every=1, t_end=100)
        >>> first = set((layer.weight != 0).flatten().nonzero().flatten().tolist())
        >>> layer(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()  # an ordinary step, and then three tenths of the weights change places
        >>> mask = set(optimizer.state[layer.weight]["indices"].tolist())
        >>> len(first), len(mask), 0 < len(mask - first) <= 61
        (205, 205, True)
    """

    fixed: ClassVar[Mapping[str, Any]] = {**CHOSEN, "grow": "gradient"}

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
        distribution: str = "erk",
        update_every: int = 100,
        drop_fraction: float = 0.3,
        t_end: int | None = None,
        init: str | None = None,
        rescale_init: bool = False,
        reinit_when_same: bool = False,
        grown_step: str = "shared",
        grown_warmup: int = 0,
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())
