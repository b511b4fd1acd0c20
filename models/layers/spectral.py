"""SST, sparse spectral training: W by its singular values and vectors.  Zhao et al. 2024, arXiv:2405.15481.

    W = U diag(sigma) V^T,  k = min(m, n);  r of the k pairs of vectors are active: U_A (m x r), V_A (n x r)
    H        =  x V                                  N x k
    y        =  (H * sigma) U^T + bias
    C        =  dy U                                 N x k
    dsigma   =  column sums of H * C                 exact, for all k
    dU_A     =  dy^T H_A,   dV_A = x^T C_A           "enhanced": autograd's have a factor sigma more
    dx       =  (C * sigma) V^T
    after each step:         sigma <- max(sigma, 0), active columns <- themselves / their norm
    at times:                other pairs become active, each likelier the larger its sigma          swap
    at longer times:         U, sigma, V <- SVD of W                                                refactor

No m x n gradient is formed. The parameters are never replaced: ``swap`` and ``refactor`` write into them, and the
function stays what it was. When to call them, what follows each step, and what becomes of moments is the optimizer's
business (``gracile.optim.SSTAdamW``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...fp64 import fp64_device
from ...validation import is_whole, require
from ..core.factored_linear import FactoredWeight, Parts, as_rows


class SpectralLinear(FactoredWeight):
    """y = x (U diag(sigma) V^T)^T + bias; sigma and ``rank`` pairs of vectors are trained at a time (arXiv:2405.15481).

    Parameters ``U`` (out x rank), ``V`` (in x rank) and ``sigma`` (k, the active ones first); ``U_frozen`` and
    ``V_frozen`` hold the other k - rank columns: frozen parameters and not buffers, so that engines split and cast
    them. ``from_linear`` keeps the weight; a new one is drawn as ``nn.Linear``'s.

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        rank: r, how many of the k = min(in, out) pairs of vectors are trained at a time.
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Raises:
        ValueError: for a rank below 1 or above the smaller side.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import SpectralLinear
        >>> linear = nn.Linear(64, 32)
        >>> layer = SpectralLinear.from_linear(linear, rank=4)
        >>> {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
        {'bias': (32,), 'U': (32, 4), 'V': (64, 4), 'sigma': (32,)}
        >>> torch.allclose(layer.merge().weight, linear.weight, atol=1e-5)
        True
    """

    method = "sst"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rank: int, **placed: Any) -> None:
        super().__init__(in_features, out_features, bias, **placed)
        most = min(in_features, out_features)
        require(is_whole(rank) and 1 <= rank <= most, f"rank must be a whole number from 1 to {most} here", rank)
        self.rank = rank
        self.U = nn.Parameter(torch.empty(out_features, rank, **placed))
        self.V = nn.Parameter(torch.empty(in_features, rank, **placed))
        self.sigma = nn.Parameter(torch.empty(most, **placed))
        for name, side in (("U_frozen", out_features), ("V_frozen", in_features)):  # engines cannot split nothing
            frozen = nn.Parameter(torch.empty(side, most - rank, **placed), requires_grad=False)
            self.register_parameter(name, frozen if rank < most else None)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: Tensor = _Spectral.apply(x, self.U, self.U_frozen, self.V, self.V_frozen, self.sigma)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def trained_weight(self) -> Tensor:
        W: Tensor = _SpectralWeight.apply(self.U, self.U_frozen, self.V, self.V_frozen, self.sigma)
        return W

    @torch.no_grad()
    def dense(self, parts: Parts | None = None) -> Tensor:
        U, V, sigma = _spectrum(self.parts() if parts is None else parts)
        return (U * sigma) @ V.mT

    # ---- what an optimizer does at its times ----------------------------------------------------------------------

    def probabilities(self, parts: Parts | None = None) -> Tensor:
        """Of each pair to be drawn next (k): half of it even, half by the size of sigma."""
        sizes = (self.sigma.detach() if parts is None else parts["sigma"]).float().clamp(min=0)
        even = torch.full_like(sizes, 1 / len(sizes))
        total = sizes.sum()
        return torch.where((total > 0) & total.isfinite(), 0.5 * (even + sizes / total.clamp(min=1e-30)), even)

    @torch.no_grad()
    def swap(self, chosen: Tensor, parts: Parts | None = None) -> Tensor:
        """Make the pairs ``chosen`` (rank different numbers below k) the active ones. W does not change.

        Args:
            parts: in place of the layer's own, written to.

        Returns:
            The former numbers of the pairs in their new order (k).

        Raises:
            ValueError: for another number of them, or one that comes twice.
        """
        held = self.parts() if parts is None else parts
        k = len(held["sigma"])
        stays = torch.ones(k, dtype=torch.bool, device=held["sigma"].device)
        stays[chosen] = False
        different = chosen.shape == (self.rank,) and int(stays.sum()) == k - self.rank
        require(different, f"chosen must be {self.rank} different numbers below {k}", chosen.tolist())
        order = torch.cat([chosen.to(stays.device), stays.nonzero().view(-1)])
        U, V, sigma = _spectrum(held)
        self._write(U[:, order], V[:, order], sigma[order], held)
        return order

    @torch.no_grad()
    def refactor(self, parts: Parts | None = None) -> None:
        """U, sigma, V anew by the SVD of W, the largest ones active. W stays; between two calls columns are of length
        one but not orthogonal, and sigma are not singular values."""
        held = self.parts() if parts is None else parts
        W = self.dense(held)
        if W.isfinite().all():  # else it has none, and the run is lost without a crash here
            self.factor(W, held)

    @torch.no_grad()
    def factor(self, weight: Tensor, parts: Parts | None = None) -> None:
        if weight.is_meta:
            return
        exact = torch.float64 if min(weight.shape) <= 1024 else torch.float32
        U, sigma, Vh = torch.linalg.svd(weight.to(fp64_device(weight.device)).to(exact), full_matrices=False)
        # a pair may change its sign where a weight changes in its last bit: the largest of each column of U is positive
        signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        self._write(U * signs, Vh.mT * signs, sigma, self.parts() if parts is None else parts)

    def _write(self, U: Tensor, V: Tensor, sigma: Tensor, parts: Parts) -> None:
        for name, columns in (("U", U), ("V", V)):
            parts[name].copy_(columns[:, : self.rank])
            if f"{name}_frozen" in parts:
                parts[f"{name}_frozen"].copy_(columns[:, self.rank :])
        parts["sigma"].copy_(sigma)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank} of {min(self.in_features, self.out_features)}"


def _spectrum(parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """All of U, V and sigma, what is active first."""
    U, V = (_columns(parts[name], parts.get(f"{name}_frozen")) for name in ("U", "V"))
    return U, V, parts["sigma"]


def _columns(active: Tensor, frozen: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Side by side; all may be active."""
    columns = active if frozen is None else torch.cat([active, frozen], 1)
    return columns if dtype is None else columns.to(dtype)


class _Spectral(torch.autograd.Function):
    """Active and frozen columns are put side by side for a moment, and sigma multiplies columns of U or V (of m and n
    rows) and not of H or C (of N): one product each, and no other pass over what is as long as N but for dsigma's.
    What is narrower than the parameters, under autocast, is made anew in the backward pass and not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, U_frozen: Tensor | None, V: Tensor, V_frozen: Tensor | None, sigma: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            H = x @ _columns(V, V_frozen, x.dtype)
            ctx.save_for_backward(x, H, U, U_frozen, V, V_frozen, sigma)
            return F.linear(H, _columns(U, U_frozen, x.dtype) * sigma.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, H, U, U_frozen, V, V_frozen, sigma = ctx.saved_tensors
        need_x, need_U, _, need_V, _, need_sigma = ctx.needs_input_grad
        r = U.shape[1]
        dx = dU = dV = dsigma = None
        with torch.autocast(x.device.type, enabled=False):
            C = dy @ _columns(U, U_frozen, x.dtype)
            if need_x:
                dx = F.linear(C, _columns(V, V_frozen, x.dtype) * sigma.to(x.dtype))
            if need_U:
                dU = (as_rows(dy).mT @ as_rows(H)[:, :r]).to(U.dtype)
            if need_V:
                dV = (as_rows(x).mT @ as_rows(C)[:, :r]).to(V.dtype)
            if need_sigma:
                dsigma = as_rows(C.mul_(H)).sum(0).to(sigma.dtype)  # C is not needed any more
        return dx, dU, None, dV, None, dsigma


class _SpectralWeight(torch.autograd.Function):
    """W itself, with the same gradients: of G, its own, as dy^T x is in a pass."""

    @staticmethod
    def forward(
        ctx: Any, U: Tensor, U_frozen: Tensor | None, V: Tensor, V_frozen: Tensor | None, sigma: Tensor
    ) -> Tensor:
        ctx.save_for_backward(U, U_frozen, V, V_frozen, sigma)
        return (_columns(U, U_frozen) * sigma) @ _columns(V, V_frozen).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        U, U_frozen, V, V_frozen, _ = ctx.saved_tensors
        need_U, _, need_V, _, need_sigma = ctx.needs_input_grad
        dU = dV = dsigma = None
        if need_U or need_sigma:
            H = G @ (_columns(V, V_frozen) if need_sigma else V)  # m x k: dU is its active columns
            dU = H[:, : U.shape[1]].contiguous() if need_U else None
            dsigma = H.mul_(_columns(U, U_frozen)).sum(0) if need_sigma else None
        if need_V:
            dV = G.mT @ U
        return dU, None, dV, None, dsigma
