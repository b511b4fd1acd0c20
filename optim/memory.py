"""What an optimizer's state costs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that ``optimizer`` (any torch optimizer) holds as state in this process."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def adamw_state_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes that ``torch.optim.AdamW`` would hold for ``parameters``: two moments in their dtype, a fp32 counter."""
    return sum(2 * p.numel() * p.element_size() + 4 for p in parameters)
