"""CAST (arXiv:2509.25996), the weight scaling: a weight whose rows are scaled in a few pieces.

    W: m x n,  A: m x g = 1                     both trained; g pieces of n / g consecutive inputs
    V    =  W[r, c] * A[r, floor(c / (n / g))]              the weight that acts
    y    =  x V^T + bias                                    dense: masks are ``CastAdamS``'s
    G    =  dy^T x                                          m x n, for a moment
    dW   =  G * A,    dA[r, i] = sum over piece i of G[r] * W[r],    dx = dy V
    at the end:  W <- W * P,  P = 1 at the N largest |W| of every M along a row;  then W <- V, and A is gone

Nothing of the size of W is kept between the passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...nm_pattern import check_pattern, largest
from ...validation import is_whole, require
from ..core.factored_linear import DenseWeight, as_rows


class ScaledLinear(DenseWeight):
    """y = x (W * A)^T + bias, where each column of A scales its piece of the columns of W (CAST, arXiv:2509.25996).

    ``from_linear`` keeps the weight, and what the layer computes. ``merge`` folds A into W, and computes what the
    layer does; ``sparsify`` before it makes the layer what CAST's training was for.

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        pieces: g, the columns of A (out x pieces).
        n, m: how many of every m consecutive inputs ``sparsify`` leaves.
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Parameters: W (out x in), A, and the bias.

    Raises:
        ValueError: for values out of range, or where m or pieces do not divide in_features.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import ScaledLinear
        >>> linear = nn.Linear(64, 32)
        >>> layer = ScaledLinear.from_linear(linear, pieces=2)
        >>> tuple(layer.A.shape), torch.equal(layer.merge().weight, linear.weight)
        ((32, 2), True)
        >>> layer.sparsify()  # CastAdamS does this after its last step
        >>> (layer.merge().weight != 0).view(-1, 4).sum(dim=1).unique()  # of every 4 weights
        tensor([2])
    """

    needs_mask = True  # its weight belongs into a group with an n

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pieces: int = 2,
        n: int = 2,
        m: int = 4,
        **placed: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **placed)
        check_pattern(n, m)
        require(in_features % m == 0, f"in_features must be a multiple of m={m}", in_features)
        divides = is_whole(pieces) and pieces >= 1 and in_features % pieces == 0
        require(divides, f"pieces must be a whole number that divides in_features={in_features}", pieces)
        self.pieces, self.n, self.m = pieces, n, m
        self.A = nn.Parameter(torch.empty(out_features, pieces, **placed))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.A)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: Tensor = _Scaled.apply(x, self.weight, self.A)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.trained_weight()

    def trained_weight(self) -> Tensor:
        return _scaled(self.weight, self.A)

    @torch.no_grad()
    def sparsify(self) -> None:
        """W <- W * P. Pruned weights are nearly zero by then; ``CastAdamS`` does the same after its last step."""
        self.weight.mul_(largest(self.weight, self.n, self.m))

    def finish(self) -> None:
        """``sparsify``: done already where the run was as long as CAST's ``total_steps``."""
        self.sparsify()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pieces={self.pieces}, {self.n}:{self.m}"


def _scaled(W: Tensor, A: Tensor) -> Tensor:
    return (W.unflatten(1, (A.shape[1], -1)) * A.unsqueeze(2)).flatten(1)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, A)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _scaled(W, A).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A = ctx.saved_tensors
        need_x, need_W, need_A = ctx.needs_input_grad
        dx = dW = dA = None
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                dx = dy @ _scaled(W, A).to(dy.dtype)
            if need_W or need_A:
                G = (as_rows(dy).mT @ as_rows(x)).to(W.dtype)
                if need_A:
                    wide = torch.promote_types(A.dtype, torch.float32)
                    dA = (G * W).unflatten(1, (A.shape[1], -1)).sum(2, dtype=wide).to(A.dtype)
                dW = _scaled(G, A) if need_W else None
        return dx, dW, dA
