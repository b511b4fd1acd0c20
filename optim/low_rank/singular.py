"""Leading singular vectors of a gradient: exact, or by warm-started orthogonal iteration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...fp64 import fp64_device, has_fp64
from ..core.batches import is_stacked_at
from ..distributed import PendingSolve, ProjectionSide, stacked

Total = Callable[[Tensor], Tensor]  # in place

SUBSPACE_METHODS = ("svd", "iterate")
WIDENED = 2**22  # elements of a gradient that are made wider at a time
WIDEST_ERROR = torch.finfo(torch.float32).eps  # of columns whose squares fp64 can hold
COLD_ITERATIONS = 8  # from a random start; afterwards one from the previous subspace holds the energy


def leading_singular_vectors(gradient: Tensor, side: ProjectionSide, previous: Tensor | None = None) -> Tensor:
    """The r leading right (n x r) or left (m x r) singular vectors of an m x n gradient, in the gradient's dtype.

    One thin SVD in at least fp32, as GaLore's code does (Zhao et al. 2024, arXiv:2403.03507): the signs it
    happens to return matter, because moments are kept across refreshes. A gradient that is not finite gives NaN; an
    all-zero one, as an expert has that no token came to, keeps ``previous``, where the authors' code takes any.
    """
    finite = torch.isfinite(gradient).all()  # LAPACK would raise; asking the device would stop it
    G = torch.where(finite, gradient, 0).to(torch.promote_types(gradient.dtype, torch.float32))
    try:
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # the divide-and-conquer driver can fail on finite matrices
        warnings.warn(
            f"the SVD of a {G.shape[0]} x {G.shape[1]} gradient failed ({error}); "
            "found the same subspace from its Gram matrix in fp64",
            RuntimeWarning,
            stacklevel=2,
        )
        columns = _by_gram_matrix(G, side)
    else:
        columns = Vh[: side.rank].t() if side.right else U[:, : side.rank]
    if previous is not None:
        columns = torch.where(G.count_nonzero() > 0, columns, previous.to(columns.dtype))
    return torch.where(finite, columns, torch.nan).to(gradient.dtype)


def leading_of_large(gradient: Tensor, side: ProjectionSide) -> Tensor:
    """``leading_singular_vectors`` of the short side of a large matrix, without a copy of it and all of its vectors:
    the eigenvectors of its Gram matrix, and one orthogonal iteration for what squares lose in fp32. In fp32 at least,
    and with other signs, perhaps."""
    lines = gradient if side.right else gradient.t()
    wide = torch.promote_types(gradient.dtype, torch.float32)
    size = torch.linalg.vector_norm(gradient, torch.inf).to(wide).clamp_(min=torch.finfo(wide).tiny)
    gram = gradient.new_zeros(side.line_length, side.line_length, dtype=wide)
    parts = torch.split(lines, max(1, WIDENED // lines.shape[1]))
    for part in parts:
        unit = part.to(wide) / size  # squares could overflow
        gram.addmm_(unit.t(), unit)
    finite = torch.isfinite(gram.sum())  # of which no unit entry can be too large
    del unit
    _, vectors = torch.linalg.eigh(gram.masked_fill_(~finite, 0))
    del gram
    vectors = vectors[:, -side.rank :].flip(1)
    Z = torch.zeros_like(vectors)
    for part in parts:
        unit = part.to(wide) / size
        Z.addmm_(unit.t(), unit @ vectors)
    return torch.where(finite, orthonormalized(Z, vectors), torch.nan)


def _by_gram_matrix(G: Tensor, side: ProjectionSide) -> Tensor:
    """The same vectors up to sign, from the eigenvectors of G^T G or G G^T, whichever is small, in fp64."""
    if not has_fp64(G.device):
        return _by_gram_matrix(G.cpu(), side).to(G)
    G = G.double()
    m, n = G.shape
    short_is_right = m >= n
    _, eigenvectors = torch.linalg.eigh(G.t() @ G if short_is_right else G @ G.t())
    short: Tensor = eigenvectors.flip(1)[:, : side.rank]  # eigh sorts upwards
    if side.right == short_is_right:
        return short
    long: Tensor = torch.linalg.qr(G @ short if short_is_right else G.t() @ short)[0]
    return long


def orthogonal_iteration(
    gradient: Tensor,
    side: ProjectionSide,
    previous: Tensor | None,
    total: Total = lambda part: part,
    seed: int = 0,
    sums: torch.dtype = torch.float32,
) -> Tensor:
    """About the r leading singular vectors of an m x n gradient, near those of ``previous``, in the gradient's dtype.

    Q <- qr(G^T G Q) on the right, qr(G G^T Q) on the left: once from ``previous``, several times from a random start,
    which is a function of ``seed``, where there is none. Coordinates move little between refreshes, so kept moments
    stay meaningful; with positive diagonals the QR has one answer. Where the gradient has fewer than r directions, the
    previous ones fill up; an all-zero gradient keeps them all, one that is not finite gives NaN.

    ``gradient`` may be some lines of the matrix, each process's own: ``total`` then sums over processes. Products are
    in ``sums``, or the gradient's dtype where that is wider: in fp64 the order of the sums, as processes share them
    out, does not move the columns.
    """
    if not _computes(sums, gradient.device):
        held = None if previous is None else previous.cpu()
        return orthogonal_iteration(gradient.cpu(), side, held, total, seed, sums).to(gradient.device)
    lines = gradient if side.right else gradient.t()
    return iterated(lambda Q: total(_gram_times(lines, Q)), side, previous, gradient.new_empty(0), seed, sums)


def _computes(sums: torch.dtype, device: torch.device) -> bool:
    """Whether a device has numbers of a dtype."""
    return sums != torch.float64 or has_fp64(device)


def iterated(
    gram_times: Callable[[Tensor], Tensor],
    side: ProjectionSide,
    previous: Tensor | None,
    like: Tensor,
    seed: int = 0,
    sums: torch.dtype = torch.float32,
) -> Tensor:
    """``orthogonal_iteration`` by the products of a matrix, with columns of the dtype of ``like``."""
    wide = like.new_empty(0, dtype=torch.promote_types(like.dtype, sums))
    error = rounding_error(like.dtype)
    Q = random_columns(side.basis_shape, seed, wide) if previous is None else previous.to(wide.dtype)
    for _ in range(COLD_ITERATIONS if previous is None else 1):
        Q = orthonormalized(gram_times(Q), Q, error)
    return Q.to(like.dtype)


def rounding_error(dtype: torch.dtype) -> float:
    """Of sums over numbers of ``dtype``, which are made in fp32 at least."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _gram_times(lines: Tensor, Q: Tensor, out: Tensor | None = None) -> Tensor:
    """G^T G Q of G (lines x side), which is made as wide as Q some lines at a time."""
    if lines.dtype == Q.dtype or lines.numel() <= WIDENED:
        G = lines.to(Q.dtype)
        return torch.mm(G.t(), G @ Q, out=out)
    Z = torch.zeros_like(Q) if out is None else out.zero_()
    for part in torch.split(lines, max(1, WIDENED // lines.shape[1])):
        G = part.to(Q.dtype)
        Z.addmm_(G.t(), G @ Q)
    return Z


@dataclass(frozen=True)
class PendingIteration:
    """``orthogonal_iteration`` of a whole matrix, to be run together with those of alike matrices."""

    gradient: Tensor
    side: ProjectionSide
    previous: Tensor | None
    sums: torch.dtype = field(default=torch.float32, kw_only=True)

    @staticmethod
    def run(pending: Sequence[PendingIteration]) -> Tensor:
        return orthogonal_iterations(pending)


@dataclass(frozen=True)
class PendingRange(PendingIteration):
    """``randomized_range`` likewise."""

    seed: int
    oversampling: int
    iterations: int

    @staticmethod
    def run(pending: Sequence[PendingIteration]) -> Tensor:
        return randomized_ranges([one for one in pending if isinstance(one, PendingRange)])


Columns = Tensor | PendingSolve | PendingIteration  # found, or begun


def orthogonal_iterations(pending: Sequence[PendingIteration]) -> Tensor:
    """``orthogonal_iteration`` of several matrices that are alike (matrices x side x r), all orthonormalized together,
    where each launch costs."""
    side, like = pending[0].side, pending[0].gradient
    if not _computes(pending[0].sums, like.device):
        alone = [orthogonal_iteration(one.gradient, side, one.previous, sums=one.sums) for one in pending]
        return torch.stack(alone)
    wide, error = torch.promote_types(like.dtype, pending[0].sums), rounding_error(like.dtype)
    Q = _stacked_previous(pending, wide)
    warm = Q is not None
    if Q is None:
        Q = random_columns(side.basis_shape, 0, like.new_empty(0, dtype=wide)).expand(len(pending), -1, -1)
    G = _Matrices([one.gradient for one in pending], wide)
    for _ in range(1 if warm else COLD_ITERATIONS):
        Q = orthonormalized(G.gram_times(Q, side.right), Q, error)
    return Q.to(like.dtype)


def _stacked_previous(pending: Sequence[PendingIteration], dtype: torch.dtype) -> Tensor | None:
    held = [one.previous for one in pending if one.previous is not None]
    return torch.stack(held).to(dtype) if held else None


class _Matrices:
    """Alike matrices for products with a stack: a stack too where they are small or lie so, else one by one."""

    def __init__(self, held: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.held = held
        small = is_stacked_at(held[0].numel(), few_kernels=True)
        self.stack = stacked(held)[0].to(dtype) if small else None

    def times(self, X: Tensor) -> Tensor:
        """G X of each."""
        if self.stack is not None:
            return self.stack @ X
        return self._one_by_one(X, self.held[0].shape[0], lambda G: G)

    def transposed_times(self, X: Tensor) -> Tensor:
        """G^T X of each."""
        if self.stack is not None:
            return self.stack.mT @ X
        return self._one_by_one(X, self.held[0].shape[1], lambda G: G.t())

    def gram_times(self, Q: Tensor, right: bool) -> Tensor:
        """G^T G Q (right) or G G^T Q of each."""
        if self.stack is not None:
            return self.transposed_times(self.times(Q)) if right else self.times(self.transposed_times(Q))
        found = Q.new_empty(Q.shape)
        for G, own, product in zip(self.held, Q, found, strict=True):
            _gram_times(G if right else G.t(), own, out=product)
        return found

    def _one_by_one(self, X: Tensor, rows: int, seen: Callable[[Tensor], Tensor]) -> Tensor:
        found = X.new_empty(len(self.held), rows, X.shape[-1])
        for G, own, product in zip(self.held, X, found, strict=True):
            times(seen(G), own, product)
        return found


def times(G: Tensor, X: Tensor, out: Tensor) -> None:
    """G X, of G made as wide as X some rows at a time."""
    rows = len(G) if G.dtype == X.dtype else max(1, WIDENED // G.shape[1])
    for part, product in zip(torch.split(G, rows), torch.split(out, rows), strict=True):
        torch.mm(part.to(X.dtype), X, out=product)


def orthonormalized(columns: Tensor, previous: Tensor, error: float | None = None) -> Tensor:
    """An orthonormal basis of the span of ``columns``, filled up by ``previous`` where they span less than r. Of one
    matrix (side x r), or of each of several.

    One rounding ``error`` (by default of their dtype) of the previous columns is added: nothing beside a direction that
    the new ones have, and where they have none, as much as the rounding of the sums that made them. The result is Q of
    the QR with a positive diagonal, which has one answer, found from the Gram matrix (Cholesky QR, twice): its
    triangles are r x r, where Householder's QR takes longer than both products of an iteration. In fp64, because
    rounding in fp32 shows up tenfold in the directions of least energy. ``columns`` is used up.
    """
    if not has_fp64(columns.device):
        return orthonormalized(columns.cpu(), previous.cpu(), error).to(columns.device)
    precision = torch.finfo(columns.dtype)
    size = torch.linalg.vector_norm(columns, torch.inf, dim=(-2, -1), keepdim=True)
    size.clamp_(min=precision.tiny)  # squares could overflow
    error = precision.eps if error is None else error
    Z = columns.div_(size).add_(previous, alpha=error)
    if error < WIDEST_ERROR:  # columns in fp64 that may be so nearly parallel that no type is wide enough for squares
        return positive_qr(Z)
    # unit columns: what is left is their angles
    X = Z.div_(torch.linalg.vector_norm(Z, dim=-2, keepdim=True)).double().mT
    L = _cholesky(X @ X.mT)
    Z.mT.copy_(torch.linalg.solve_triangular(L, X, upper=False, out=X))  # orthonormal to about 1e-3 at worst
    del X
    L = _cholesky((Z.mT @ Z).double()).to(Z.dtype)
    orthonormal: Tensor = torch.linalg.solve_triangular(L, Z.mT, upper=False).mT
    return orthonormal


def _cholesky(gram: Tensor) -> Tensor:
    """The lower triangle of a Gram matrix of r unit vectors, which rounding may leave with negative eigenvalues.

    They are lifted by r rounding errors, and by more where that was too little: hundreds of nearly parallel vectors, as
    a gradient of rank one makes them, are off by as much. Whether it went well is not asked of the device. ``gram`` is
    used up.
    """
    r, error = gram.shape[-1], torch.finfo(gram.dtype).eps
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(r * error)
    lower, failed = torch.linalg.cholesky_ex(gram)
    diagonal.add_(r * r / 16 * error)
    lifted, _ = torch.linalg.cholesky_ex(gram, out=(gram, torch.empty_like(failed)))
    found: Tensor = torch.where(failed[..., None, None] == 0, lower, lifted, out=lower)
    return found


def randomized_range(
    gradient: Tensor,
    side: ProjectionSide,
    previous: Tensor | None,
    seed: int,
    oversampling: int = 8,
    iterations: int = 2,
    total: Total = lambda part: part,
) -> Tensor:
    """About the r leading singular vectors of an m x n gradient by randomized subspace iteration, in order.

    Halko, Martinsson & Tropp 2011, arXiv:0909.4061. With A = G^T on the right, A = G on the left (short x long):

        Q  <-  r + p normal columns; or those of ``previous`` and p normal ones
        Q  <-  qr(A A^T Q)               ``iterations`` times, once more without ``previous``
        P  <-  the r first columns of Q U, U the left singular vectors of Q^T A

    p is ``oversampling``. Signs are fixed so that every process has the same columns. An all-zero gradient keeps
    ``previous``; one that is not finite gives NaN. ``total`` as for ``orthogonal_iteration``.
    """
    G = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    A = G.t() if side.right else G
    width = min(side.rank + oversampling, *side.shape)
    wide = None if previous is None else previous.to(A.dtype)
    Q = _first_range(side, None if wide is None else wide[None], width, [seed], A)[0]
    for _ in range(iterations + (previous is None)):
        Q = orthonormalized(total(A @ (A.t() @ Q)), Q)
    small = Q.t() @ A  # (r + p) x long
    columns = _leading(Q, total(small @ small.t()), side.rank, wide)
    return columns.to(gradient.dtype)


def randomized_ranges(pending: Sequence[PendingRange]) -> Tensor:
    """``randomized_range`` of several matrices that are alike (matrices x side x r)."""
    side, first = pending[0].side, pending[0]
    dtype = torch.promote_types(first.gradient.dtype, torch.float32)
    width = min(side.rank + first.oversampling, *side.shape)
    wide = _stacked_previous(pending, dtype)
    like = first.gradient.new_empty(0, dtype=dtype)
    Q = _first_range(side, wide, width, [one.seed for one in pending], like)
    G = _Matrices([one.gradient for one in pending], dtype)
    times, transposed = (G.transposed_times, G.times) if side.right else (G.times, G.transposed_times)
    for _ in range(first.iterations + (wide is None)):
        Q = orthonormalized(times(transposed(Q)), Q)
    small = transposed(Q)  # long x (r + p)
    return _leading(Q, small.mT @ small, side.rank, wide).to(first.gradient.dtype)


def _first_range(
    side: ProjectionSide, previous: Tensor | None, width: int, seeds: Sequence[int], like: Tensor
) -> Tensor:
    """Orthonormal columns to begin with, of each of several matrices (matrices x short x width)."""
    short, rank = side.basis_shape
    if previous is None:
        return _random_columns((short, width), seeds, like)
    Q: Tensor = torch.linalg.qr(torch.cat([previous, _normals((short, width - rank), seeds, like)], dim=-1))[0]
    return Q


def _leading(Q: Tensor, squares: Tensor, rank: int, previous: Tensor | None) -> Tensor:
    """The ``rank`` leading left singular vectors of A among the span of Q, of which ``squares`` is Q^T A A^T Q: its
    eigenvectors, at the price of one small symmetric problem."""
    if not has_fp64(Q.device):
        held = None if previous is None else previous.cpu()
        return _leading(Q.cpu(), squares.cpu(), rank, held).to(Q.device)
    squares = squares.double()
    finite = (
        torch.isfinite(squares).all(-1, keepdim=True).all(-2, keepdim=True)
    )  # LAPACK would raise; asking would wait
    U = torch.linalg.eigh(torch.where(finite, squares, 0))[1].flip(-1)[..., :rank].to(Q.dtype)
    columns = Q @ U
    largest = columns.gather(-2, columns.abs().argmax(dim=-2, keepdim=True))  # one row of signs
    columns = columns * torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)
    if previous is not None:
        energy = torch.diagonal(squares, dim1=-2, dim2=-1).sum(-1)[..., None, None]
        columns = torch.where(energy > 0, columns, previous)
    found: Tensor = torch.where(finite, columns, torch.nan)
    return found


def random_columns(shape: tuple[int, int], seed: int, like: Tensor) -> Tensor:
    """Orthonormal columns, uniform over all, from ``seed`` alone."""
    return _random_columns(shape, [seed], like)[0]


def _random_columns(shape: tuple[int, int], seeds: Sequence[int], like: Tensor) -> Tensor:
    wide = torch.empty(0, dtype=torch.float64, device=fp64_device(like.device))
    return positive_qr(_normals(shape, seeds, wide)).to(like)


def _normals(shape: tuple[int, int], seeds: Sequence[int], like: Tensor) -> Tensor:
    """The same numbers on every device and process (seeds x shape)."""
    numbers = torch.empty(len(seeds), *shape, dtype=torch.float64, device="cpu")
    for own, seed in zip(numbers, seeds, strict=True):
        own.normal_(generator=torch.Generator("cpu").manual_seed(seed))
    return numbers.to(like)


def positive_qr(columns: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(columns)
    signs = torch.where(torch.diagonal(R, dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    signed: Tensor = Q.mul_(signs.to(Q.dtype).unsqueeze(-2))
    return signed
