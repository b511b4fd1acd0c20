"""W = B A: the low-rank baseline that the papers beat.  Kamalakara et al. 2022, arXiv:2209.13569.

A: r x n, B: m x r        both trained from random starts
y = (x A^T) B^T + bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...validation import is_whole, require
from ..core.factored_linear import FactoredLinear


class LowRankLinear(FactoredLinear):
    """y = x (B A)^T + bias, with A (rank x in) and B (out x rank): the low-rank baseline (arXiv:2209.13569).

    The entries of the product start with the variance of ``nn.Linear``'s. ``from_linear`` keeps no weight: the method
    trains from scratch.

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        rank: r, columns of B and rows of A.
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Parameters: ``rank * (in + out)`` elements, and the bias.

    Raises:
        ValueError: for a rank below 1 or above both sides.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import LowRankLinear
        >>> layer, x = LowRankLinear(64, 32, rank=4), torch.randn(16, 64)
        >>> layer(x).shape, sum(p.numel() for p in layer.parameters())  # nn.Linear has 2080
        (torch.Size([16, 32]), 416)
        >>> torch.allclose(layer.merge()(x), layer(x), atol=1e-5)
        True
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rank: int, **placed: Any) -> None:
        super().__init__(in_features, out_features, bias, **placed)
        most = min(in_features, out_features)
        require(is_whole(rank) and 1 <= rank <= most, f"rank must be a whole number from 1 to {most} here", rank)
        self.rank = rank
        self.A = nn.Parameter(torch.empty(rank, in_features, **placed))
        self.B = nn.Parameter(torch.empty(out_features, rank, **placed))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.A, -(self.in_features**-0.5), self.in_features**-0.5)
        nn.init.uniform_(self.B, -((3 / self.rank) ** 0.5), (3 / self.rank) ** 0.5)
        self._reset_bias()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A), self.B, self.bias)

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.trained_weight()

    def trained_weight(self) -> Tensor:
        return self.B @ self.A

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
