"""SRigL: RigL with as many weights in each row.  Lasby et al. 2024, arXiv:2305.02299.

    B     =  the weights of the matrix that stay,  k = floor(B / rows that are not ablated)
    every update_every steps before t_end, after the step itself, with n as in RigL:
    S     <-  the |M| - n largest |W| of the mask  and  the n largest |G| of the matrix           salient
    rows with fewer than gamma_sal k of S are ablated, never so many that k exceeds the columns
    keep  <-  of the rows that stay, the |M| - n largest |W|, no more than the k largest of a row
    grow  <-  for each of these rows, the largest |G| outside of keep, up to k weights

A row is a neuron. Its values and columns make two dense m x k arrays: gracile.models.layers.CondensedLinear. A matrix
whose rows must all stay, a classifier, goes into a group with ``gamma_sal=0``; param_groups leaves a model's output
layer out of masks. optim/sparse/optimizer.py has the steps, optim/sparse/structured_masks.py the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from .optimizer import SparseOptimizer
from .rigl import CHOSEN


class SRigLAdamW(SparseOptimizer):
    """RigL with constant fan-in, as many weights in every row, and neuron ablation (SRigL, arXiv:2305.02299).

    Args:
        params, lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        sparsity, density, distribution, update_every, drop_fraction, t_end, init, rescale_init, reinit_when_same,
            grown_step, grown_warmup, seed, state_dtype: as for ``SparseAdamW``.
        gamma_sal: a row is kept if at least this share of its weights is salient, or this number of them, from 1 on;
            0 keeps every row. The authors tune it: 0.3 for convolutions, 0.95 for transformers.
        transposed_experts: of experts that are stored as E x in x out (gpt-oss): as rows count their columns, the
            neurons; where each process has whole experts, as with FSDP2.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix that keeps K weights: ``indices`` (int32) and two moments of K elements, and a counter.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range, or where a row
            would have less than one weight.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import CondensedLinear
        >>> from gracile.optim import SRigLAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> groups = param_groups(model, sparsity=0.75, target_modules="all-linear", gamma_sal=0)
        >>> optimizer = SRigLAdamW(groups, lr=0.01, distribution="uniform", t_end=750)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> (model[0].weight != 0).sum(dim=1).unique()  # weights in a row of 64
        tensor([16])
        >>> CondensedLinear.from_linear(model[0]).values.shape  # for inference
        torch.Size([32, 16])
    """

    fixed: ClassVar[Mapping[str, Any]] = {**CHOSEN, "grow": "gradient", "structure": "constant_fan_in"}
    later_keys: ClassVar[Mapping[str, Any]] = {**SparseOptimizer.later_keys, "transposed_experts": False}

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
        gamma_sal: float = 0.3,
        init: str | None = None,
        rescale_init: bool = False,
        reinit_when_same: bool = False,
        grown_step: str = "shared",
        grown_warmup: int = 0,
        transposed_experts: bool = False,
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())
