"""Maestro: factors whose components are ordered by importance.  Horvath et al. 2023, arXiv:2308.14929.

    W = U V^T,  U: m x k,  V: n x k,  k = min(m, n)
    y        =  (x V[:, :b]) U[:, :b]^T + bias            b components; a sampler draws b, or it is the layer's width
    penalty  =  sum over i of  |U[:, i:]| + |V[:, i:]|    late components are in many tails
    shrink:     width <- the first i for which |U[:, i:]| |V[:, i:]| is below a threshold, relative to the first

Components that are kept are a prefix: the layer stores one number, and takes views. The norm of a tail has no gradient
at zero: it is 0 there. The threshold is relative to the first component by default, for the authors' absolute 1e-5
depends on the layer's scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...fp64 import fp64_device
from ...validation import is_real, is_whole, require
from ..core.factored_linear import FactoredWeight


class OrderedLowRankLinear(FactoredWeight):
    """y = x (U V^T)^T + bias, of which the first ``width`` components count (Maestro, arXiv:2308.14929).

    In training the first ``sampled`` count, where a sampler has set it. ``from_linear`` keeps the weight: U and V start
    as its singular vectors times the roots of its singular values. A new layer starts so, too, from a weight drawn as
    ``nn.Linear``'s.

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        rank: the most components; min(in, out) by default.
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Parameters: U (out x rank), V (in x rank), and the bias.

    Raises:
        ValueError: for a rank below 1 or above the smaller side.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import OrderedLowRankLinear
        >>> linear = nn.Linear(64, 32)
        >>> _ = linear.weight.data[8:].zero_()  # a weight of rank 8
        >>> layer = OrderedLowRankLinear.from_linear(linear)
        >>> layer.width, layer.shrink(threshold=1e-4)
        (32, 8)
        >>> torch.allclose(layer.merge().weight, linear.weight, atol=1e-5)
        True
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, rank: int | None = None, **placed: Any
    ) -> None:
        super().__init__(in_features, out_features, bias, **placed)
        most = min(in_features, out_features)
        k = most if rank is None else rank
        require(is_whole(k) and 1 <= k <= most, f"rank must be a whole number from 1 to {most} here, or None", rank)
        self.rank = self.width = k
        self.sampled: int | None = None  # set before a pass, so that a pass that is done again sees the same
        self.U = nn.Parameter(torch.empty(out_features, k, **placed))
        self.V = nn.Parameter(torch.empty(in_features, k, **placed))
        self.reset_parameters()

    @torch.no_grad()
    def factor(self, weight: Tensor) -> None:
        if weight.is_meta:
            return
        U, sigma, Vh = torch.linalg.svd(weight.to(fp64_device(weight.device)).double(), full_matrices=False)
        roots = sigma[: self.rank].sqrt()
        self.U.copy_(U[:, : self.rank] * roots)
        self.V.copy_(Vh[: self.rank].mT * roots)

    def forward(self, x: Tensor) -> Tensor:
        b = self._components()
        return F.linear(x @ self.V[:, :b], self.U[:, :b], self.bias)

    def trained_weight(self) -> Tensor:
        b = self._components()
        return self.U[:, :b] @ self.V[:, :b].mT

    def _components(self) -> int:
        return self.width if self.sampled is None or not self.training else min(self.sampled, self.width)

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.U[:, : self.width] @ self.V[:, : self.width].mT

    def penalty(self) -> Tensor:
        """The hierarchical group lasso of this layer, in fp32 at least; differentiable, 0 where a tail is zero."""
        return _tails(self.U[:, : self.width]).sum() + _tails(self.V[:, : self.width]).sum()

    @torch.no_grad()
    def shrink(self, threshold: float = 1e-5, relative: bool = True) -> int:
        """Leave out the last components whose importance, the product of both tails, is below ``threshold``.

        Args:
            relative: to the importance of all components together.

        Returns:
            The new width; at least 1.
        """
        require(is_real(threshold) and threshold >= 0, "threshold must be a number >= 0", threshold)
        importance = _tails(self.U[:, : self.width]) * _tails(self.V[:, : self.width])
        least = threshold * importance[0] if relative else torch.as_tensor(threshold)
        self.width = max(1, int((importance >= least).sum()))
        return self.width

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.width)

    def set_extra_state(self, state: Tensor) -> None:
        self.width = int(state)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, width={self.width}"


def _tails(factor: Tensor) -> Tensor:
    """|F[:, i:]| for each i (k)."""
    wide = torch.promote_types(factor.dtype, torch.float32)
    squares = factor.to(wide).square().sum(0).flip(0).cumsum(0).flip(0)
    safe = squares.where(squares > 0, 1.0)
    return torch.where(squares > 0, safe.sqrt(), 0.0)
