"""N:M sparsity: of every M consecutive inputs of a row, N weights count.  Zhou et al. 2021, arXiv:2102.04010 (SR-STE);
Bambhaniya et al. 2024, arXiv:2402.04744 (decaying masks).

    W: m x n dense, trained;  P: 1 where |W| is among the N largest of its M consecutive entries of a row, else 0
    F    =  P + (1 - P) b                     b from 1 (dense) to 0 (the pattern): ``models.layer_schedules``
    y    =  x (W * F)^T + bias                the mask is found anew in each pass
    dx   =  dy (W * F)
    dW   =  dy^T x                            straight through: what is pruned has a gradient, and may come back
            (dy^T x) * F                      flow "scaled": the derivative as it is; the authors never use it

Exactly N of each M stay, of equals the first. The mask is a function of the weight that the pass sees, whole, so that
every layout has the same; nothing of the size of W is kept between the passes. Departures from the published codes: one
drops the bias and the other always makes one; the second one's N:M is 2:2, dense, where it is not given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...nm_pattern import check_pattern, largest
from ...validation import require
from ..core.factored_linear import DenseWeight, as_rows

FLOWS = ("ste", "scaled")


class NMLinear(DenseWeight):
    """y = x (W * F)^T + bias: n of every m weights count, and between 0 and 1 of the others while a mask decays.

    Sources: SR-STE (arXiv:2102.04010), decaying masks (arXiv:2402.04744). ``from_linear`` keeps the weight. ``merge``
    and ``dense`` give W * P, whatever the mask is at the time: with ``residue`` at 0 and ``pattern`` at (n, m), where a
    layer begins and where a decay ends, that is what it computes.

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        n: how many weights of each group are kept.
        m: the size of a group of consecutive inputs.
        flow: of the gradient to the weight: ``ste``, all of it, or ``scaled``, the literal derivative.
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Parameters: W (out x in), and the bias.

    Raises:
        ValueError: for values out of range, or where m does not divide in_features.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import NMLinear
        >>> layer = NMLinear.from_linear(nn.Linear(64, 32), n=2, m=4)
        >>> (layer.merge().weight != 0).view(-1, 4).sum(dim=1).unique()  # of every 4 weights
        tensor([2])
        >>> layer(torch.randn(16, 64)).square().mean().backward()
        >>> int(layer.weight.grad.count_nonzero())  # pruned weights have a gradient, too
        2048
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        n: int = 2,
        m: int = 4,
        flow: str = "ste",
        **placed: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **placed)
        check_pattern(n, m)
        require(flow in FLOWS, f"flow must be one of {', '.join(FLOWS)}", flow)
        require(in_features % m == 0, f"in_features must be a multiple of m={m}", in_features)
        self.n, self.m, self.flow = n, m, flow
        # Of the mask at this time; set before a pass, so that a pass that is done again sees the same.
        self.pattern, self.residue = (n, m), 0.0
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: Tensor = _Masked.apply(x, self.weight, *self.pattern, self.residue, self.flow == "scaled")
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def trained_weight(self) -> Tensor:
        W: Tensor = _MaskedWeight.apply(self.weight, *self.pattern, self.residue, self.flow == "scaled")
        return W

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.weight * largest(self.weight, self.n, self.m)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.n}:{self.m}, flow={self.flow}"


def _scaled(values: Tensor, W: Tensor, n: int, m: int, residue: float) -> Tensor:
    """``values`` * F, as W's mask has it."""
    if residue == 1:
        return values
    keep = largest(W, n, m)
    return torch.where(keep, values, values * residue) if residue else values * keep


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, n: int, m: int, residue: float, scaled: bool) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.mask, ctx.scaled = (n, m, residue), scaled
        with torch.autocast(x.device.type, enabled=False):
            # masked before it is rounded: in fewer bits more of the weights would be equals
            return F.linear(x, _scaled(W, W, *ctx.mask).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        need_x, need_W, *_ = ctx.needs_input_grad
        dx = dW = None
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                dx = dy @ _scaled(W, W, *ctx.mask).to(dy.dtype)
            if need_W:
                dW = (as_rows(dy).mT @ as_rows(x)).to(W.dtype)
                dW = _scaled(dW, W, *ctx.mask) if ctx.scaled else dW
        return dx, dW, None, None, None, None


class _MaskedWeight(torch.autograd.Function):
    """The same where W * F multiplies elsewhere: ``dWF`` is what a pass has as dy^T x."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, n: int, m: int, residue: float, scaled: bool) -> Tensor:
        ctx.save_for_backward(W)
        ctx.mask, ctx.scaled = (n, m, residue), scaled
        return _scaled(W, W, *ctx.mask).view_as(W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dWF: Tensor) -> tuple[Tensor | None, ...]:
        (W,) = ctx.saved_tensors
        return _scaled(dWF, W, *ctx.mask) if ctx.scaled else dWF, None, None, None, None
