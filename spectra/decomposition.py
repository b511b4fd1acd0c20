"""Singular values and vectors by the Gram matrix of a matrix's short side, in fp64.

For a short side of s the eigenvectors of W W^T (s x s) are the singular vectors of that side, those of the other are
W^T U / sigma. In fp64 that is as exact as an SVD in fp32 (a singular value is off by 1e-8 of the largest), and faster:
with the Gram matrix 0.06 s instead of 0.13 for 512 x 1376 on a core, 3.1 instead of 4.8 for 2048 x 2048.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LINES = 1024  # of a matrix that are in fp64 at a time
ROUNDING = 1e-6  # singular values below this share of the largest are an fp32 matrix's rounding
SPARE, DEPTH = 8, 12  # vectors more than are wanted, and powers of G, in a Krylov space
SPACES = 2  # after which all eigenvectors are no dearer
RESIDUAL = 1e-8  # of the largest eigenvalue


class Spectrum(NamedTuple):
    """Of a matrix with s rows and at least as many columns.

    values: all s singular values in fp64, falling.
    vectors: s x k, the leading left singular vectors: those whose value is not rounding, at most as many as were asked.
    """

    values: Tensor
    vectors: Tensor

    @property
    def rank(self) -> int:
        """How many values are above rounding."""
        return int((self.values > ROUNDING * self.values[0]).sum())


def gram(W: Tensor) -> Tensor:
    """W W^T (s x s) in fp64, of an s x n matrix in any dtype."""
    G = W.new_zeros(len(W), len(W), dtype=torch.float64)
    for i in range(0, W.shape[1], LINES):
        part = W[:, i : i + LINES].double()
        G.addmm_(part, part.mT)
    return G


def spectrum(G: Tensor, k: int | None = None) -> Spectrum:
    """Of the matrix whose Gram matrix is G, with ``k`` leading vectors or all."""
    if k is None or not _krylov_is_cheaper(len(G), k):
        eigenvalues, vectors = torch.linalg.eigh(G)
        values, vectors = eigenvalues.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    else:
        values = torch.linalg.eigvalsh(G).clamp(min=0).sqrt().flip(0)
        vectors = leading(G, k)
    found = Spectrum(values, vectors)
    return Spectrum(values, vectors[:, : min(found.rank, len(G) if k is None else k)])


def leading(G: Tensor, k: int) -> Tensor:
    """``k`` leading eigenvectors (s x k) of a positive semidefinite G (s x s), from a subspace iteration that keeps all
    its powers (block Krylov; Musco & Musco 2015, arXiv:1504.05477); from all eigenvectors where that is cheaper, or
    where the leading ones are so close to others that iteration does not part them.
    """
    if not _krylov_is_cheaper(len(G), k):
        return torch.linalg.eigh(G).eigenvectors.flip(1)[:, :k]
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(len(G), k + SPARE, generator=generator, dtype=torch.float64).to(G.device)
    for _ in range(SPACES):
        powers = [torch.linalg.qr(X).Q]
        for _ in range(DEPTH - 1):
            powers.append(torch.linalg.qr(G @ powers[-1]).Q)
        Q = torch.linalg.qr(torch.cat(powers, dim=1)).Q
        GQ = G @ Q
        values, Y = torch.linalg.eigh(Q.mT @ GQ)
        Y = Y.flip(1)[:, : k + SPARE]
        X = Q @ Y
        errors = (GQ @ Y[:, :k] - X[:, :k] * values.flip(0)[:k]).norm(dim=0)
        if errors.max() <= RESIDUAL * values[-1]:
            return X[:, :k]
    return torch.linalg.eigh(G).eigenvectors.flip(1)[:, :k]


def _krylov_is_cheaper(s: int, k: int) -> bool:
    return 2 * DEPTH * (k + SPARE) <= s
