"""AutoSparse: a threshold that each layer learns, and pruned weights that can come back.  Kundu et al. 2023,
arXiv:2304.06941.

    W: m x n,  s: one number,  theta = sigmoid(s),  a_t: from the step alone, a_0 to 0        annealed
    W~   =  sign(W) relu(|W| - theta)               made for a moment, in the forward pass and again in the backward
    y    =  x W~^T + bias
    G    =  dy^T x                                  m x n, for a moment
    dW   =  G h,   h = 1 where |W| > theta, else a_t
    ds   =  -sigmoid'(s) * (the sum of G sign(W) h),   dx = dy W~

With a fixed budget there is no s: W~ is W with all but its largest weights zero, and h = 1 for those.

Read were the abstracts and the code of others who had the paper's text (PQuantML), where s may also be one number for
each output or weight; what is said of s is STR's (Kusupati et al. 2020, arXiv:2002.03231). The annealing is in
``gradient_annealing``. Ours: a ceiling on theta, which keeps a least density where a layer's weights would all sink
below it together; s has its gradient there too, so that the loss can lower it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...validation import is_real, require
from ..core.factored_linear import DenseWeight

MARGIN = 1 / 64  # below the weight that must stay: what bf16 rounds, and weights that tie


class ThresholdLinear(DenseWeight):
    """y = x W~^T + bias, where W~ is W shrunk towards zero by a learned threshold, or W's largest weights.

    Sources: AutoSparse (arXiv:2304.06941), STR (arXiv:2002.03231). ``from_linear`` keeps the weight. theta is absolute:
    ``s_init=-5`` starts it at 0.0067, where a weight drawn with LLaMA's deviation of 0.02 has a density of 0.74. Apart
    from the loss only weight decay moves s, towards theta = 0.5: decay it. In bf16 an s of -5 moves in steps of 1/32 or
    not at all: train in fp32, under autocast, or in an engine that keeps wider weights.

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        sparsity: the share of W that is zero, exactly, ties kept from the lowest index on; None learns a threshold.
        s_init: where s starts; theta = sigmoid(s).
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Parameters: W (out x in), s (1) where the threshold is learned, and the bias.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import ThresholdLinear
        >>> linear = nn.Linear(64, 32)
        >>> layer = ThresholdLinear.from_linear(linear, s_init=-3.0)
        >>> theta = layer.threshold()
        >>> torch.equal(layer.merge().weight != 0, linear.weight.abs() > theta)
        True
        >>> int(ThresholdLinear.from_linear(linear, sparsity=0.75).merge().weight.count_nonzero())  # of 2048
        512
    """

    annealed: Tensor  # a_t; 0 until GradientAnnealing sets it
    ceiling: Tensor  # on theta
    kept: Tensor  # weights that were not zero when last counted

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float | None = None,
        s_init: float = -5.0,
        **placed: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **placed)
        share = sparsity is None or (is_real(sparsity) and 0 <= sparsity < 1)
        require(share, "sparsity must be a number in [0, 1) or None", sparsity)
        require(is_real(s_init), "s_init must be a finite number", s_init)
        self.sparsity, self.s_init = sparsity, s_init
        elements = in_features * out_features
        self.budget = None if sparsity is None else elements - math.floor(sparsity * elements + 1e-9)
        # of one dimension, for FSDP2 splits no scalars
        self.s = nn.Parameter(torch.empty(1, **placed)) if sparsity is None else None
        self.register_buffer("annealed", torch.empty(1, **placed), persistent=False)
        self.register_buffer("ceiling", torch.empty(1, **placed))
        kept = torch.empty((), dtype=torch.int64, device=placed.get("device"))
        self.register_buffer("kept", kept)
        self.counts, self.least = False, 0  # whether a pass counts, and how many weights must stay
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.s is not None:
            self.s.fill_(self.s_init)
        self.annealed.zero_()
        self.ceiling.fill_(1.0)
        self.kept.fill_(self.weight.numel() if self.budget is None else self.budget)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.counts and self.s is not None:
            self._count()
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # W is cut off as wide as it is, and rounded afterwards
        y: Tensor = _Sparse.apply(x, self.weight, self.s, self.threshold(), self.annealed.clone(), self.budget)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def trained_weight(self) -> Tensor:
        if self.training and self.counts and self.s is not None:
            self._count()
        W: Tensor = _SparseWeight.apply(self.weight, self.s, self.threshold(), self.annealed.clone(), self.budget)
        return W

    @torch.no_grad()
    def threshold(self) -> Tensor:
        """What a weight must exceed (1), in fp32 at least: theta; of a budget the smallest weight that stays."""
        if self.s is None:
            assert self.budget is not None
            return _largest(self.weight, self.budget)
        wide = _wide(self.s)
        return torch.minimum(wide.sigmoid(), self.ceiling.to(wide.dtype))

    @torch.no_grad()
    def _count(self) -> None:
        """In a pass, where every engine has all of W."""
        if self.least:
            self.ceiling.copy_(_largest(self.weight, self.least).mul_(1 - MARGIN).clamp_(max=1.0))
        self.kept.copy_((_wide(self.weight).abs() > self.threshold()).sum())

    @torch.no_grad()
    def dense(self) -> Tensor:
        return _sparse(self.weight, self.threshold(), self.budget).to(self.weight.dtype)

    def extra_repr(self) -> str:
        own = f"s_init={self.s_init:g}" if self.sparsity is None else f"sparsity={self.sparsity:g}"
        return f"{super().extra_repr()}, {own}"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _largest(weight: Tensor, count: int) -> Tensor:
    """The ``count``-th largest of the absolute values (1)."""
    magnitudes = _wide(weight).abs().view(-1)
    return magnitudes.kthvalue(magnitudes.numel() - count + 1).values.view(1)


def _alive(weight: Tensor, theta: Tensor, budget: int | None) -> Tensor:
    magnitudes = _wide(weight).abs()
    above = magnitudes > theta
    if budget is None:
        return above
    ties = magnitudes == theta
    order = ties.view(-1).cumsum(0, dtype=torch.int32).view_as(ties)  # from 1 on, by index
    return above | (ties & (order <= budget - above.sum()))


def _sparse(weight: Tensor, theta: Tensor, budget: int | None) -> Tensor:
    """W~, in fp32 at least where a threshold is taken off."""
    if budget is not None:
        return torch.where(_alive(weight, theta, budget), weight, 0.0)
    wide = _wide(weight)
    return wide - wide.clamp(-theta, theta)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, s: Tensor | None, theta: Tensor, annealed: Tensor, budget: int | None
    ) -> Tensor:  # x: ... x n; y: ... x m
        ctx.save_for_backward(x, weight, s, theta, annealed)
        ctx.budget = budget
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _sparse(weight, theta, budget).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, s, theta, annealed = ctx.saved_tensors
        need_x, need_weight, need_s, *_ = ctx.needs_input_grad
        dx = dweight = ds = None
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                dx = dy @ _sparse(weight, theta, ctx.budget).to(dy.dtype)
            if need_weight or need_s:
                G = _wide(dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1]))
                dweight, ds = _gradients(G, weight, s if need_s else None, theta, annealed, ctx.budget)
        return dx, dweight, ds, None, None, None


def _gradients(
    G: Tensor, weight: Tensor, s: Tensor | None, theta: Tensor, annealed: Tensor, budget: int | None
) -> tuple[Tensor, Tensor | None]:
    """dW and ds of G, the gradient of W~ in fp32 at least."""
    G = torch.where(_alive(weight, theta, budget), G, G * annealed.to(G.dtype))
    if s is None:
        return G.to(weight.dtype), None
    sigma = _wide(s).sigmoid()
    return G.to(weight.dtype), (-sigma * (1 - sigma) * (G * weight.sign()).sum()).to(s.dtype)


class _SparseWeight(torch.autograd.Function):
    """W~ itself, in W's dtype, with the same gradients."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, s: Tensor | None, theta: Tensor, annealed: Tensor, budget: int | None
    ) -> Tensor:
        ctx.save_for_backward(weight, s, theta, annealed)
        ctx.budget = budget
        return _sparse(weight, theta, budget).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        weight, s, theta, annealed = ctx.saved_tensors
        dweight, ds = _gradients(_wide(G), weight, s if ctx.needs_input_grad[1] else None, theta, annealed, ctx.budget)
        return dweight, ds, None, None, None
