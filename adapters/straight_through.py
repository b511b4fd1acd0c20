"""Masks that are trained through scores: a mask is zeros and ones, and its gradient is taken for the scores'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(scores: Tensor, mask: Tensor) -> Tensor:
    """``mask`` (bool, of the shape of ``scores``) as numbers, with d mask / d scores = 1."""
    found: Tensor = _Straight.apply(scores, mask)
    return found


def packed_bits(mask: Tensor) -> Tensor:
    """A mask of any shape as uint8, eight elements a byte."""
    flat = mask.flatten()
    bits = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of ``packed_bits``."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].view(shape).bool()
