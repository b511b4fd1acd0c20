"""Leading singular vectors of a gradient: exact, or by warm-started orthogonal iteration."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .basis import Frame

SUBSPACE_METHODS = ("svd", "iterate")
COLD_ITERATIONS = 8  # from a random start; afterwards one from the previous subspace holds the energy


def leading_singular_vectors(gradient: Tensor, frame: Frame) -> Tensor:
    """The r leading right (n x r) or left (m x r) singular vectors of an m x n gradient, in the gradient's dtype.

    One thin SVD in at least fp32, as GaLore's code does (Zhao et al. 2024, arXiv:2403.03507): the signs it
    happens to return matter, because moments are kept across refreshes.
    """
    G = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    try:
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # the divide-and-conquer driver can fail on finite matrices
        warnings.warn(
            f"the SVD of a {G.shape[0]} x {G.shape[1]} gradient failed ({error}); "
            "found the same subspace from its Gram matrix in fp64",
            RuntimeWarning,
            stacklevel=2,
        )
        columns = _by_gram_matrix(G, frame)
    else:
        columns = Vh[: frame.rank].t() if frame.right else U[:, : frame.rank]
    return columns.to(gradient.dtype)


def _by_gram_matrix(G: Tensor, frame: Frame) -> Tensor:
    """The same vectors up to sign, from the eigenvectors of G^T G or G G^T, whichever is small, in fp64."""
    G = G.double()
    m, n = G.shape
    short_is_right = m >= n
    _, eigenvectors = torch.linalg.eigh(G.t() @ G if short_is_right else G @ G.t())
    short: Tensor = eigenvectors.flip(1)[:, : frame.rank]  # eigh sorts upwards
    if frame.right == short_is_right:
        return short
    long: Tensor = torch.linalg.qr(G @ short if short_is_right else G.t() @ short)[0]
    return long


def orthogonal_iteration(gradient: Tensor, frame: Frame, previous: Tensor | None) -> Tensor:
    """About the r leading singular vectors of an m x n gradient, near those of ``previous``, in the gradient's dtype.

    Q <- qr(G^T G Q) on the right, qr(G G^T Q) on the left: once from ``previous``, several times from a fixed random
    start where there is none. Coordinates move little between refreshes, so kept moments stay meaningful. QR in fp64
    with positive diagonals has one answer: the same on every process, for any number of threads. Where the gradient
    has fewer than r directions, the previous ones fill up; an all-zero gradient keeps them all.
    """
    G = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    cold = previous is None
    Q = _random_columns(frame, G) if previous is None else previous.to(G.dtype)
    for _ in range(COLD_ITERATIONS if cold else 1):
        Z = G.t() @ (G @ Q) if frame.right else G @ (G.t() @ Q)
        # One part in 1e10 of the old columns: nothing beside a direction of G, everything where G has none.
        floor = 1e-10 * torch.linalg.vector_norm(Z, dtype=torch.float64) + torch.finfo(torch.float64).tiny
        Q = _positive_qr(Z.double() + floor * Q.double()).to(G.dtype)
    return Q.to(gradient.dtype)


def _random_columns(frame: Frame, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same numbers on every device and process
    columns = torch.randn(*frame.basis_shape, generator=generator, dtype=torch.float64)
    return _positive_qr(columns).to(like)


def _positive_qr(columns: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(columns)
    signed: Tensor = Q * torch.where(torch.diagonal(R) < 0, -1.0, 1.0).to(Q.dtype)
    return signed
