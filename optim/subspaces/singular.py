"""Leading singular vectors of a gradient."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .basis import Frame


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
