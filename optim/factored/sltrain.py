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

from ..core.rules_8bit import of_codes
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
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n layer: ``2 * (r * (m + n) + q)`` elements and three counters.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range, or where no
            parameter belongs to such a layer.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.models.convert import convert
        >>> from gracile.models.layers import SparseLowRankLinear
        >>> from gracile.optim import SLTrainAdamW, param_groups, state_bytes
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> model = convert(model, SparseLowRankLinear, ["0"], rank=4, density=0.125)
        >>> optimizer = SLTrainAdamW(param_groups(model, weight_decay=0.0))
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> {name: tuple(optimizer.state[p]["exp_avg"].shape) for name, p in model[0].named_parameters()}
        {'bias': (32,), 'A': (4, 64), 'B': (32, 4), 'values': (256,)}
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
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())


class SLTrainAdamW8bit(SLTrain):
    """``SLTrainAdamW`` with 8-bit moments, as the authors train 7B (arXiv:2406.02214).

    Args:
        params, lr, betas, eps, weight_decay: as for ``SLTrainAdamW``.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n layer: the elements of ``SLTrainAdamW`` in 8 bits, and 8 bytes for each block of 256 elements of
    both moments; moments of fewer than 4096 elements stay in fp32.

    Raises:
        ImportError: at construction, without bitsandbytes.
        ValueError: at construction, as ``SLTrainAdamW``.
        RuntimeError: at ``step``, as ``SLTrainAdamW``.

    Example:
        >>> from torch import nn
        >>> from gracile.models.convert import convert
        >>> from gracile.models.layers import SparseLowRankLinear
        >>> from gracile.optim import SLTrainAdamW8bit, param_groups
        >>> model = convert(nn.Sequential(nn.Linear(256, 64)), SparseLowRankLinear, ["0"], rank=16)
        >>> optimizer = SLTrainAdamW8bit(param_groups(model))
        >>> model(torch.randn(16, 256)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].A]["exp_avg"].dtype, optimizer.state[model[0].bias]["exp_avg"].dtype
        (torch.uint8, torch.float32)
    """

    moment_codec = IN_8_BITS
    rule_of_codes = of_codes(SLTrain.rule)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **torch_keywords: object,
    ) -> None:
        require_bitsandbytes()
        super().__init__(params, locals())
