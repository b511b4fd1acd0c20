"""Lion: the sign of an interpolated momentum.  Chen et al. 2023, arXiv:2302.06675.

For a tensor W of any shape with gradient G:

                     W  <-  W - lr * decay * W                       decay first
                     N   =  sign(b1 M + (1 - b1) G)                  the OLD moment; sign(0) = 0
                     W  <-  W - lr * N
                     M  <-  b2 M + (1 - b2) G                        from zero, no bias correction

Departure from the published code: the moment is fp32 at least (``state_dtype`` restores the parameter's dtype).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.optim.optimizer import ParamsT

from .core.keywords import ACCEPTED, OF_LION, Accepted
from .core.optimizer import ShardedOptimizer
from .core.rules import LION


class Lion(ShardedOptimizer):
    """Lion on whole tensors: one moment, updates of equal size (arXiv:2302.06675).

    Against AdamW, use a learning rate 3 to 10 times smaller and a decay as much larger.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim.AdamW``; there is no ``rank``.
        lr: learning rate; every entry moves by it.
        betas: of the interpolation and of the moment.
        weight_decay: decoupled, applied before the step.
        state_dtype: dtype of the moment; None for fp32, or wider where the parameter is.
        torch_keywords: as for ``GaLoreAdamW``.

    State: as many elements as the parameters, and a counter for each.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import Lion, param_groups
        >>> model = nn.Linear(4, 2)
        >>> before = model.weight.detach().clone()
        >>> optimizer = Lion(param_groups(model), lr=0.5)
        >>> model(torch.ones(1, 4)).sum().backward()  # a gradient of ones
        >>> optimizer.step()
        >>> torch.allclose(model.weight, before - 0.5), sorted(optimizer.state[model.weight])
        (True, ['exp_avg', 'step'])
    """

    rule = LION
    captures = True
    moves_int8_weights: ClassVar[bool] = True
    accepted: ClassVar[Mapping[str, Accepted]] = {**ACCEPTED, **OF_LION}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())
