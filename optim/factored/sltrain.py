"""SLTrain: AdamW on the factors and the sparse values of a weight.  Han et al. 2024, arXiv:2406.02214.

    for each layer W = s B A + S         the layer rebuilds W, and gives the gradients of A, B and the values of S
    M, V   of A, B and the values        r (m + n) + q elements each, against m n
    A, B, values <- Adam

The optimizer is AdamW itself: what SLTrain saves, the layer saves. As a class of its own it has the paper's defaults,
an 8-bit form, the same state under ZeRO and FSDP2 as elsewhere, and it refuses a model without the layers. Decay acts
on the factors and not on W, and is 0 by default, as in the authors' recipes.
"""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from ..state.blockwise_8bit import IN_8_BITS, require_bitsandbytes
from .optimizer import FactoredOptimizer


class SLTrain(FactoredOptimizer):
    """The loop above; the classes below choose how moments are stored."""

    method = "sltrain"
    layer_class = "SparseLowRankLinear"


class SLTrainAdamW(SLTrain):
    """AdamW for models with ``SparseLowRankLinear`` layers (arXiv:2406.02214).

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim.AdamW``.
        lr: learning rate; the authors' is 3e-3 at every size.
        betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.

    State of an m x n layer: ``2 * (r * (m + n) + q)`` elements and three counters.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range, or where no
            parameter belongs to such a layer.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, locals())


class SLTrainAdamW8bit(SLTrain):
    """``SLTrainAdamW`` with 8-bit moments, as the authors train 7B.

    Two moments take 2 bytes an element, and 8 for each block of 256 elements; those of fewer than 4096 stay fp32.

    Raises:
        ImportError: at construction, without bitsandbytes.
        ValueError: as ``SLTrainAdamW``.
    """

    moment_codec = IN_8_BITS

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        require_bitsandbytes()
        super().__init__(params, locals())
