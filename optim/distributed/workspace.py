"""Scratch memory that the matrices of one step share."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Memory for some rows of a product, reused by all matrices of a step: fresh pages for each cost a tenth of it."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._numbers: dict[tuple[float, torch.device, torch.dtype, str], Tensor] = {}

    def number(
        self, value: float, device: torch.device, dtype: torch.dtype = torch.float32, what: str = "step"
    ) -> Tensor:
        """A scalar on the device, made once a step for each ``what``. Not to be written to."""
        key = value, device, dtype, what
        if key not in self._numbers:
            self._numbers[key] = torch.full((), value, dtype=dtype, device=device)
        return self._numbers[key]

    def clear(self) -> None:
        """Give the memory back, before a method that needs as much for something else."""
        self._memory = None

    def like(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor of the same shape and dtype, with anything in it."""
        held = self._memory
        if held is None or held.dtype != tensor.dtype or held.device != tensor.device or held.numel() < tensor.numel():
            self._memory = held = None  # before the larger one is born
            self._memory = held = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        return held[: tensor.numel()].view(tensor.shape)
