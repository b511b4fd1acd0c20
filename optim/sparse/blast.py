"""BLaST: blocks of weights, fewer and fewer.  Okanovic et al. 2025, arXiv:2507.03117.

    every update_every steps, and at t_end, after the step itself:
    s     =  sparsity + (initial_sparsity - sparsity) (1 - t / t_end)^3                  cubic, from dense by default
    K     =  round((1 - s) blocks),  n = floor(drop_fraction / 2 (1 + cos(pi t / t_end)) K)
    keep  <-  the K - n blocks of the mask with the largest |W_B|                        Frobenius norms
    grow  <-  the n others with the largest |G_B|

A departure, for the paper's own text was not at hand: the cubic and growth by gradients are the usual choices for what
its abstract calls iterative sparsification. The same sparsity for all matrices, so that block products are of equal
work. optim/sparse/optimizer.py has the steps, optim/sparse/structured_masks.py the choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..core.group_checks import parameters_in
from ..core.types import Group
from ..distributed import full_shape
from .experts import as_matrix
from .optimizer import SparseOptimizer

BLOCK_SIZES = (64, 32, 16, 8)


class BlockSparseAdamW(SparseOptimizer):
    """AdamW that prunes whole blocks of weights, more and more, for block-sparse products (BLaST, arXiv:2507.03117).

    Args:
        params, lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        sparsity, density, distribution, update_every, drop_fraction, t_begin, t_end, init, rescale_init,
            reinit_when_same, grown_step, grown_warmup, seed, state_dtype: as for ``SparseAdamW``.
        block_size: b, rows and columns of a block; it divides both sides of every masked matrix. None, for each group:
            64, or the largest power of two below, and at least 8, that does.
        initial_sparsity: at the start; None for ``sparsity`` from the first step on.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix that keeps K weights: ``indices`` (int32) and two moments of K elements, and a counter.
    While the matrix is dense that is 1.5 times AdamW's.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import BlockSparseAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> groups = param_groups(model, sparsity=0.75, target_modules=["0"], block_size=8)
        >>> optimizer = BlockSparseAdamW(groups, lr=0.01, update_every=1, t_end=2)  # dense at first
        >>> for _ in range(2):
        ...     model(torch.randn(16, 64)).square().mean().backward()
        ...     optimizer.step()
        >>> mask = torch.zeros(32 * 64).index_fill_(0, optimizer.state[model[0].weight]["indices"].long(), 1)
        >>> mask.view(4, 8, 8, 8).sum(dim=(1, 3)).unique(return_counts=True)  # weights of a block, number of blocks
        (tensor([ 0., 64.]), tensor([24,  8]))
    """

    fixed: ClassVar[Mapping[str, Any]] = {
        "drop": "magnitude",
        "grow": "gradient",
        "schedule": "cosine",
        "structure": "block",
        "drop_lambda": 0.0,
    }

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
        distribution: str = "uniform",
        update_every: int = 100,
        drop_fraction: float = 0.05,
        t_begin: int = 0,
        t_end: int | None = None,
        block_size: int | None = None,
        initial_sparsity: float | None = 0.0,
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

    def add_param_group(self, param_group: Group) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; a group of masks gets a ``block_size`` that divides it."""
        group = dict(param_group)
        keys = {**self.defaults, **group}
        if keys["block_size"] is None and self.is_for_matrices(keys) and not isinstance(group["params"], set):
            held = group["params"]
            group["params"] = [held] if isinstance(held, Tensor) else list(held)
            group["block_size"] = _largest_block([as_matrix(full_shape(p)) for p in parameters_in(group)])
        super().add_param_group(group)


def _largest_block(shapes: list[tuple[int, int]]) -> int:
    sides = math.gcd(*(side for shape in shapes for side in shape))
    fitting = [size for size in BLOCK_SIZES if sides % size == 0]
    if not fitting:
        raise ValueError(
            f"block_size: none of {', '.join(map(str, BLOCK_SIZES))} divides all sides of the matrices "
            f"{', '.join(map(str, sorted(set(shapes))))}; give one that does, or put some into a group of their own"
        )
    return fitting[0]
