"""Fira's growth limiter, which APOLLO has, too: the norm of an update grows by a percent or so a step, at most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..distributed import Block, FullMatrix, squares_in_blocks
from ..numbers import Number

TINY = 1e-12  # a norm below this is no norm to grow from


def limit_growth_(residual: Tensor, shard: FullMatrix, previous_norm: Tensor, growth: float) -> None:
    """Scale ``residual`` (m x n, or B x m x n) in place: its norm is at most ``growth`` times the previous one, which
    it replaces.

    Fira's limiter (Chen et al. 2024, arXiv:2410.01623). ``previous_norm`` is a scalar on the residual's device, of a
    stack B x 1 x 1, zero before the first; nothing is read by the host. A norm that vanishes (1e-12 or less) is not
    stored: growing from it by one percent a step would take thousands of steps.
    """
    excess = excess_of(shard.norm(residual, previous_norm.dtype), previous_norm, growth)
    residual.div_(excess.to(residual.dtype))


def excess_of(norm: Tensor, previous_norm: Tensor, growth: float) -> Tensor:
    """What a residual of this norm is divided by; ``previous_norm`` becomes the norm that it then has."""
    excess = (norm / (previous_norm + 1e-8)).clamp_(min=growth).div_(growth).masked_fill_(previous_norm <= 0, 1.0)
    limited = norm / excess
    torch.where(limited > TINY, limited, previous_norm, out=previous_norm)
    return excess


def limited_in_blocks(
    make: Callable[[Block], Tensor], shard: FullMatrix, previous_norm: Tensor, growth: float, factor: Number = 1.0
) -> Callable[[Block], Tensor]:
    """``limit_growth_`` of a residual that is made in blocks: once for its norm, of which ``factor`` is compared, and
    again by what this gives."""
    norm = squares_in_blocks(shard.block_shape, make, previous_norm.dtype).sqrt_()
    excess = excess_of(norm.mul_(factor), previous_norm, growth)

    def limited(block: Block) -> Tensor:
        own = make(block)
        return own.div_(excess.to(own.dtype))

    return limited
