"""SLTrain: sparse plus low-rank weights.  Han et al. 2024, arXiv:2406.02214.

    I: q = floor(density m n) places of W, drawn once, without replacement      support
    B: m x r = 0,  A: r x n ~ U(-1/sqrt n, 1/sqrt n),  v: q ~ U(-1/sqrt n, 1/sqrt n)
    s    =  alpha / r
    W    =  s B A,   W[I] += v                     made for a moment, in the forward pass and again in the backward
    y    =  x W^T + bias
    G    =  dy^T x                                 m x n, for a moment
    dB   =  s G A^T,   dA = s B^T G,   dv = G[I],   dx = dy W

Nothing of the size of W is kept between the passes. Departures from the authors' code: places are 32-bit numbers and
not 64-bit ones, which weigh four times the bf16 values that they place; they are a function of a seed and a name and
not of the generator's state, so that every process has the same; the bias starts as ``nn.Linear``'s (they bound it by
the wrong side); s is applied inside the passes. ``init_gain`` multiplies the first values: with 1, as in the paper, W
starts with only ``density`` of a dense layer's variance, for B is zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...rng import generator_of
from ...validation import is_real, is_whole, require
from ..core.factored_linear import FactoredLinear

INT32 = 2**31 - 1


class SparseLowRankLinear(FactoredLinear):
    """y = x (s B A + S)^T + bias, S with a share ``density`` of trained values at fixed places (arXiv:2406.02214).

    S has ``floor(density * out * in)`` values. ``from_linear`` keeps no weight: the method trains from scratch.

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        rank: r, of A (rank x in) and B (out x rank).
        alpha: s = alpha / rank.
        density: the share of W that is in S, from 0 to 1.
        seed, name: the places are a function of these and of the shape alone.
        init_gain: factor on the first values of S.
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Parameters: ``rank * (in + out)`` elements and the values of S, with a 32-bit place each, and the bias.

    Raises:
        ValueError: for values out of range, or a matrix of more than 2^31 - 1 elements.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import SparseLowRankLinear
        >>> layer = SparseLowRankLinear(64, 32, rank=4, density=0.125)
        >>> {name: tuple(p.shape) for name, p in layer.named_parameters()}
        {'bias': (32,), 'A': (4, 64), 'B': (32, 4), 'values': (256,)}
        >>> int(layer.dense().count_nonzero())  # B is zero at first
        256
        >>> layer.merge()
        Linear(in_features=64, out_features=32, bias=True)
    """

    method = "sltrain"

    support: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        alpha: float = 32.0,
        density: float = 0.03,
        seed: int = 0,
        name: str = "",
        init_gain: float = 1.0,
        **placed: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **placed)
        require(is_whole(rank) and rank >= 1, "rank must be a whole number >= 1", rank)
        require(is_real(alpha) and alpha > 0, "alpha must be a number > 0", alpha)
        require(is_real(density) and 0 <= density <= 1, "density must be a number in [0, 1]", density)
        require(is_whole(seed) and seed >= 0, "seed must be a whole number >= 0", seed)
        require(is_real(init_gain), "init_gain must be a finite number", init_gain)
        elements = in_features * out_features
        require(elements <= INT32, "places are 32-bit numbers: in_features * out_features must be below 2^31", elements)
        self.rank, self.alpha, self.density, self.init_gain = rank, alpha, density, init_gain
        self.seed, self.name = seed, name
        count = math.floor(density * elements)
        self.A = nn.Parameter(torch.empty(rank, in_features, **placed))
        self.B = nn.Parameter(torch.empty(out_features, rank, **placed))
        self.values = nn.Parameter(torch.empty(count, **placed))
        self.register_buffer("support", torch.empty(count, dtype=torch.int32, device=placed.get("device")))
        self.reset_parameters()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)
        nn.init.uniform_(self.values, -bound * abs(self.init_gain), bound * abs(self.init_gain))
        self._reset_bias()
        if not self.support.is_meta:
            self.support.copy_(places(self.out_features * self.in_features, len(self.support), self.seed, self.name))

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        made_of: tuple[Tensor, ...] = (x, self.A, self.B, self.values)
        if torch.is_autocast_enabled(kind):
            made_of = tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in made_of)
        y: Tensor = _SparseLowRank.apply(*made_of, self.support, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.trained_weight()

    def trained_weight(self) -> Tensor:
        return _dense(self.A, self.B, self.values, self.support, self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, density={self.density:g}"


def places(elements: int, count: int, seed: int, name: str) -> Tensor:
    """``count`` different numbers below ``elements``, ascending (int32, on the CPU), each set equally likely.

    A function of its arguments alone. Memory is a few times ``count``, never ``elements``: what repeats is drawn again.
    """
    generator = generator_of(seed, name, elements, count)
    dense = 2 * count > elements  # then those that are left out are drawn
    wanted = elements - count if dense else count
    drawn = torch.empty(0, dtype=torch.int32, device="cpu")
    while len(drawn) < wanted:
        missing = wanted - len(drawn)
        more = torch.randint(
            elements, (missing + missing // 8 + 16,), generator=generator, dtype=torch.int32, device="cpu"
        )
        drawn = torch.unique(torch.cat([drawn, more]))
    if len(drawn) > wanted:  # any of them may go: all are alike
        keep = torch.randperm(len(drawn), generator=generator, device="cpu")[:wanted]
        drawn = drawn[keep.sort().values]
    if not dense:
        return drawn
    kept = torch.ones(elements, dtype=torch.bool, device="cpu")
    kept[drawn.long()] = False
    return kept.nonzero().view(-1).int()


def _dense(A: Tensor, B: Tensor, values: Tensor, support: Tensor, scale: float) -> Tensor:
    W = (B @ A).mul_(scale)
    W.view(-1).index_add_(0, support, values)
    return W


class _SparseLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, values: Tensor, support: Tensor, scale: float
    ) -> Tensor:  # x: ... x n; y: ... x m
        ctx.save_for_backward(x, A, B, values, support)
        ctx.scale = scale
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _dense(A, B, values, support, scale))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, values, support = ctx.saved_tensors
        need_x, need_A, need_B, need_values, *_ = ctx.needs_input_grad
        dx = dA = dB = dvalues = None
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                dx = dy @ _dense(A, B, values, support, ctx.scale)
            if need_A or need_B or need_values:
                G = dy.reshape(-1, dy.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
                dvalues = G.view(-1).index_select(0, support) if need_values else None
                dA = (B.mT @ G).mul_(ctx.scale) if need_A else None
                dB = (G @ A.mT).mul_(ctx.scale) if need_B else None
        return dx, dA, dB, dvalues, None, None
