"""SoKA: the leading Kronecker products of the weight, trained.  Chong et al. 2025, arXiv:2506.15251.

    W m x n,  m = m1 m2,  n = n1 n2
    R(W)  (m1 n1) x (m2 n2):  row (i, j) is the block of m2 x n2 at i, j of W        Van Loan and Pitsianis 1993
    svd_r(R) = sum_k s_k u_k v_k^T,   U_k = u_k as m1 x n1,   V_k = v_k as m2 x n2;  all trained
    y = (W - sum_k s0_k U0_k (x) V0_k) x + sum_k s_k (U_k (x) V_k) x

For a few tokens a Kronecker product is applied as U X V^T to x as an n1 x n2 matrix; for many the sum is formed, which
is one product of (m1 n1) x 2r and 2r x (m2 n2), and in fp32 W is added to it: x is multiplied once. Nothing is kept for
backward but x. The rank is the smaller of what holds ``energy`` of R's squares and the elbow of log s, at most ``r``.
The paper's body could not be read: m1 and n1 are the divisors nearest the roots of m and n, and factors start from the
weight; its pruning in training is left out. As for SORSA what is taken off the weight is kept as frozen factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...validation import Check, flag, number
from ..config import AdapterConfig
from ..factors import svd_factors
from ..layer import AdapterLayer, Tensors
from ..names import AdapterType
from ..registry import register


@dataclass
class SokaConfig(AdapterConfig):
    """SoKA (arXiv:2506.15251): r (m1 n1 + m2 n2 + 1) trained numbers a matrix, at 4096 x 4096 8193 r.

    Attributes:
        r: the most Kronecker products of a matrix.
        energy: share of the squares of the rearranged weight to hold, for a smaller r; None for r.
        elbow: whether r is at most where the logarithms of the singular values are farthest from their chord.

    Example:
        >>> from gracile.adapters import SokaConfig
        >>> SokaConfig(r=16, target_modules=["q_proj"], energy=0.9).elbow
        False
    """

    checks: ClassVar[Mapping[str, Check]] = {"energy": number("in (0, 1]", optional=True), "elbow": flag()}

    energy: float | None = field(default=None, metadata={"help": "Share of the rearranged weight's squares to hold."})
    elbow: bool = field(default=False, metadata={"help": "Whether r is at most the elbow of the singular values."})


@register(AdapterType.SOKA, SokaConfig)
class SokaLayer(AdapterLayer):
    """A linear layer with SoKA beside it."""

    prefix, trained, frozen = "soka_", ("U", "S", "V"), ("L0", "V0")

    @property
    def most(self) -> int:
        (m1, m2), (n1, n2) = divided(self.out_features), divided(self.in_features)
        return min(m1 * n1, m2 * n2)

    def rank(self, config: Any) -> int:
        if (config.energy is None and not config.elbow) or self.name in config.rank_pattern:
            return super().rank(config)
        if self.weightless:
            return min(super().rank(config), self.most)
        R = rearranged(self.wide_weight())
        S = svd_factors(R, min(config.r, *R.shape), config.seed)[1]
        held = len(S) if config.energy is None else held_by(S, config.energy * R.square().sum())
        config.rank_pattern[self.name] = min(held, elbow(S) if config.elbow else len(S))
        return super().rank(config)

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        (m1, m2), (n1, n2) = divided(weight.shape[0]), divided(weight.shape[1])
        U, S, V = svd_factors(rearranged(weight), r, config.seed)
        S = S / config.scale_of(self.name)
        U, V = U.mT.reshape(r, m1, n1), V.reshape(r, m2, n2)
        return {"U": U, "S": S, "V": V, "L0": U * S[:, None, None], "V0": V}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        (m1, m2), (n1, n2) = divided(self.out_features), divided(self.in_features)
        return {"U": (r, m1, n1), "S": (r,), "V": (r, m2, n2), "L0": (r, m1, n1), "V0": (r, m2, n2)}

    def _products(self, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """U 2r x m1 x n1 and V 2r x m2 x n2 of what is added and of what is taken off."""
        U, S, V, L0, V0 = (tensors[name] for name in (*self.trained, *self.frozen))
        return torch.cat([U * S[:, None, None], -L0]), torch.cat([V, V0])

    def delta(self, weight: Tensor, config: Any, **tensors: Tensor) -> Tensor:
        return formed(*self._products(**tensors))

    def changed(self, x: Tensor, adapter: str) -> Tensor:
        U, V = self._products(**self.tensors(adapter))
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        found: Tensor = _KroneckerSum.apply(x, None, U, V)
        return found

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        adapter = self._adapter_to_fold(x)
        if adapter is None:
            return super().forward(x, *args, **keywords)
        base: Any = self.get_base_layer()
        U, V = self._products(**self.tensors(adapter))
        y: Tensor = _KroneckerSum.apply(x, base.weight, U * self.scale(adapter), V)
        return y if base.bias is None else y + base.bias

    def _adapter_to_fold(self, x: Tensor) -> str | None:
        """The one adapter that is active, where W + s delta can stand in for the base's pass: a weight of the factors'
        dtype that no engine, hook or dropout comes in between."""
        base: Any = self.get_base_layer()
        active = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if self.has(a)]
        if len(active) != 1 or type(base) is not nn.Linear or base is not self.base_layer:
            return None
        dropout, dtype = self.dropouts[active[0]], self._dtype(active[0])
        split = hasattr(base.weight, "ds_id") or hasattr(base.weight, "full_tensor") or base.weight.requires_grad
        watched = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        fits = x.dtype == base.weight.dtype == dtype and not torch.is_autocast_enabled(x.device.type)
        if split or watched or not fits or (dropout.training and not isinstance(dropout, nn.Identity)):
            return None
        return active[0]


def formed(U: Tensor, V: Tensor) -> Tensor:
    """The sum over k of U_k (x) V_k, m x n; U k x m1 x n1, V k x m2 x n2."""
    (_, m1, n1), (_, m2, n2) = U.shape, V.shape
    blocks = (U.flatten(1).mT @ V.flatten(1)).view(m1, n1, m2, n2)
    return blocks.transpose(1, 2).reshape(m1 * m2, n1 * n2)


def applied(x: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """The same times x (tokens x n), by two products of which none is m x n."""
    (k, m1, n1), (_, m2, n2) = U.shape, V.shape
    right = (x.reshape(-1, n2) @ V.reshape(k * m2, n2).mT).view(len(x), n1 * k, m2)
    left = U.permute(1, 2, 0).reshape(m1, n1 * k)
    return torch.bmm(left.expand(len(x), -1, -1), right).reshape(len(x), m1 * m2)


def _is_short(tokens: int, with_base: bool, U: Tensor, V: Tensor) -> bool:
    """Whether ``applied`` takes less than forming the sum. A multiplication of its small matrices counts twice."""
    (k, m1, n1), (_, m2, n2) = U.shape, V.shape
    longer = (k if with_base else k + tokens) * m1 * m2 * n1 * n2
    return 2 * tokens * k * n1 * m2 * (n2 + m1) < longer


def _times(x: Tensor, weight: Tensor | None, U: Tensor, V: Tensor) -> Tensor:
    """W x + the sum times x; x tokens x n, W m x n or None."""
    if _is_short(len(x), weight is not None, U, V):
        change = applied(x.to(U.dtype), U, V).to(x.dtype)
        return change if weight is None else change + x @ weight.mT
    change = formed(U, V).to(x.dtype)  # and not of rounded factors, of which the small difference is taken
    return x @ (change if weight is None else change + weight).mT


class _KroneckerSum(torch.autograd.Function):
    """(W + sum of U_k (x) V_k) x, whose gradients of U and V are thin products of that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, U: Tensor, V: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, U, V)
        with torch.autocast(x.device.type, enabled=False):
            return _times(x.reshape(-1, x.shape[-1]), weight, U, V).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        x, weight, U, V = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1]).to(x.dtype)
        dx = dU = dV = None
        if ctx.needs_input_grad[0]:
            turned = None if weight is None else weight.mT
            dx = _times(flat, turned, U.mT, V.mT).view(x.shape)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            dR = _of_rows(flat.mT @ x.reshape(-1, x.shape[-1]), U, V).to(U.dtype)
            dU = (V.flatten(1) @ dR.mT).view(U.shape)
            dV = (U.flatten(1) @ dR).view(V.shape)
        return dx, None, dU, dV


def _of_rows(gradient: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """A gradient of the sum (m x n) as ``rearranged``, by the factors' own sides."""
    (_, m1, n1), (_, m2, n2) = U.shape, V.shape
    return gradient.view(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)


def divided(side: int) -> tuple[int, int]:
    """A side as the product of two, the first nearest its root; of a prime number 1 and itself."""
    root = math.sqrt(side)
    first = min((d for d in range(1, side + 1) if side % d == 0), key=lambda d: abs(d - root))
    return first, side // first


def rearranged(weight: Tensor) -> Tensor:
    """R(W), (m1 n1) x (m2 n2)."""
    (m1, m2), (n1, n2) = divided(weight.shape[0]), divided(weight.shape[1])
    return weight.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)


def held_by(S: Tensor, squares: Tensor) -> int:
    """How many of the largest singular values hold this much of the squares; all of them where they do not."""
    enough = S.square().cumsum(0) >= squares
    return int(enough.int().argmax()) + 1 if enough.any() else len(S)


def elbow(S: Tensor) -> int:
    """How many singular values there are before their logarithms are farthest from the chord of first and last."""
    if len(S) < 3:
        return len(S)
    logs, places = S.clamp_min(1e-12).log(), torch.arange(len(S), device=S.device)
    chord = logs[0] + (logs[-1] - logs[0]) * places / (len(S) - 1)
    return max(1, int((logs - chord).abs().argmax()))
