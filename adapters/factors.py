"""What the methods make of weights: leading factors, distances from orthonormal, marks that tell weights apart."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_BELOW = 512  # a short side of which a whole decomposition takes little
SLACK = 8  # columns more than the rank that a randomised decomposition looks at
PASSES = 10


def svd_factors(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The leading factors U (... x m x r), S (... x r), V (... x r x n) of a weight, in fp32 and with one choice of
    signs: the largest entry of each column of U is positive.

    Of a large weight and a rank well under both sides they come from a randomised range finder (Halko et al. 2011,
    arXiv:0909.4061) with ten passes, whose generator is its own: where singular values hardly fall, as those of random
    weights, nearly the leading ones.
    """
    weight = weight.detach().float()
    if min(weight.shape[-2:]) <= max(EXACT_BELOW, 4 * rank):
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = _randomised(weight, rank, seed)
    U, S, V = U[..., :rank], S[..., :rank], V[..., :rank, :]
    signs = torch.sign(U.gather(-2, U.abs().argmax(-2, keepdim=True)))  # ... x 1 x r
    return (U * signs).contiguous(), S.contiguous(), (V * signs.mT).contiguous()


def _randomised(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = weight.shape[-1]
    columns = min(rank + SLACK, *weight.shape[-2:])
    Q = torch.randn(n, columns, generator=generator).to(weight.device)
    Q = torch.linalg.qr(weight @ Q).Q
    for _ in range(PASSES):
        Q = torch.linalg.qr(weight.mT @ Q).Q
        Q = torch.linalg.qr(weight @ Q).Q
    U, S, V = torch.linalg.svd(Q.mT @ weight, full_matrices=False)
    return Q @ U, S, V


def gram_defect(columns: Tensor) -> Tensor:
    """|| Q^T Q - I ||_F^2 of Q (... x m x r).

    Squared: the gradient of the norm itself is rounding noise of size one at orthonormal columns, where training
    begins.
    """
    gram = columns.mT @ columns
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).square().sum()


def marks(*factors: Tensor) -> Tensor:
    """Two numbers a factor, that any other base weight (another checkpoint, one rounded to 4 bits) would change."""
    numbers = []
    for factor in factors:
        flat = factor.detach().double().flatten()
        wave = torch.cos(torch.arange(flat.numel(), device=flat.device, dtype=torch.float64) * 0.7)
        numbers += [flat.norm(), (flat * wave).sum()]
    return torch.stack(numbers).float()
