"""All measures of one matrix and what became of it."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..validation import is_real, is_whole, require
from .decomposition import LINES, Spectrum, gram, spectrum
from .measures import Overlap, changed_in_bf16, drift, intruders, overlap, principal_angles, ranks_of, ratio
from .update import DenseUpdate, LowRankUpdate, Update

T = TypeVar("T")


class Measures(NamedTuple):
    """What ``compare`` finds, of an m x n matrix.

    Args:
        intruders: leading left singular vectors of W1 that are like none of W0's.
        intruder_share: of the ``k`` that were looked at.
        intruder_energy: their share of the ``k`` squared singular values.
        control: intruders where D goes into random directions: its rows and columns permuted, their signs drawn.
        control_energy: as ``intruder_energy``, of the control.
        similarity: of each of the leading vectors, the largest |cosine| to any left singular vector of W0.
        drift: NSS, the change of the singular values over their norm.
        left_angle_max, left_angle_mean: of the principal angles of the leading left subspaces, in degrees.
        right_angle_max, right_angle_mean: of the right ones.
        effective_rank: of D, exp of the entropy of its squared singular values.
        stable_rank: of D, its squared norm over its largest squared singular value.
        relative_norm: the norm of D over that of W0.
        left_inside: the share of D's squared norm within the leading left subspace of W0; by chance, ``subspace / m``.
        right_inside: within the right one; by chance, ``subspace / n``.
        unchanged: the share of weights that are the same in bf16.
        principal_overlap: the share of changed weights among the ``alpha`` largest of W0's leading part.
        principal_enrichment: that over ``alpha``.
        low_overlap: the share of changed weights among the ``alpha`` smallest of W0.
        low_enrichment: that over ``alpha``.
        subspace: dimension of the leading subspaces: as asked, at most half of the short side, and the ranks.

    Example:
        >>> from gracile.spectra import compare
        >>> W = torch.randn(32, 48)
        >>> found = compare(W, 1.5 * W)
        >>> found.intruders, round(found.drift, 4), round(found.left_angle_max, 4)
        (0, 0.5, 0.0)
    """

    intruders: int
    intruder_share: float
    intruder_energy: float
    control: int
    control_energy: float
    similarity: tuple[float, ...]
    drift: float
    left_angle_max: float
    left_angle_mean: float
    right_angle_max: float
    right_angle_mean: float
    effective_rank: float
    stable_rank: float
    relative_norm: float
    left_inside: float
    right_inside: float
    unchanged: float
    principal_overlap: float
    principal_enrichment: float
    low_overlap: float
    low_enrichment: float
    subspace: int


def compare(
    W0: Tensor,
    W1: Tensor | LowRankUpdate,
    *,
    k: int = 10,
    epsilon: float = 0.5,
    subspace: int = 64,
    alpha: float = 0.3,
    seed: int = 0,
) -> Measures:
    """Spectral measures of what a fine-tuning did to a matrix.

    Args:
        W0: m x n, outputs x inputs, before.
        W1: m x n, after; or a ``LowRankUpdate`` B A, for W0 + B A, which is not formed.
        k: leading vectors of W1 that may be intruders (10 in arXiv:2410.21228).
        epsilon: an intruder's |cosine| to each vector of W0 is below it.
        subspace: dimension of the leading subspaces, of the principal angles and of the principal mask.
        alpha: share of the weights that the masks hold.
        seed: of the control's directions.

    Raises:
        ValueError: for shapes that differ, weights that are not finite, or an argument out of range.

    Example:
        >>> from gracile.spectra import LowRankUpdate, compare
        >>> W, B, A = torch.randn(64, 64), torch.randn(64, 1), torch.randn(1, 64)
        >>> one, other = compare(W, W + 3 * B @ A), compare(W, LowRankUpdate(3 * B, A))
        >>> one.intruders, other.intruders, round(other.stable_rank, 3)
        (1, 1, 1.0)
    """
    _check(W0, W1, k=k, epsilon=epsilon, subspace=subspace, alpha=alpha)
    W = W0.float()
    D: Update = W1 if isinstance(W1, LowRankUpdate) else DenseUpdate(W1.float() - W)
    pair = _Pair.of(W, D)
    G0 = gram(pair.W)
    most = max(1, min(subspace, len(G0) // 2))
    before, after = spectrum(G0), spectrum(pair.D.gram_of_sum(pair.W, G0), max(most, k))
    control = pair._replace(D=pair.D.shuffled(torch.Generator().manual_seed(seed)))
    control_after = spectrum(control.D.gram_of_sum(pair.W, G0), k)
    seen, values = pair.similarity(before, after, k)
    found, beside = intruders(seen, values, epsilon), intruders(*control.similarity(before, control_after, k), epsilon)
    size = min(most, before.rank, after.rank)
    left, right = pair.angles(before, after, size)
    update_values = D.singular_values()
    left_inside, right_inside = pair.inside(before, size, float(update_values.square().sum()))
    changed = changed_in_bf16(pair.W, pair.D.rows)
    principal, low = pair.overlaps(before, size, changed, alpha)
    ranks = ranks_of(update_values)
    return Measures(
        intruders=found.number,
        intruder_share=found.share,
        intruder_energy=found.energy,
        control=beside.number,
        control_energy=beside.energy,
        similarity=tuple(seen.tolist()),
        drift=drift(before.values, after.values),
        left_angle_max=_most(left),
        left_angle_mean=_mean(left),
        right_angle_max=_most(right),
        right_angle_mean=_mean(right),
        effective_rank=ranks.effective,
        stable_rank=ranks.stable,
        relative_norm=ratio(float(update_values.norm()), float(before.values.norm())),
        left_inside=left_inside,
        right_inside=right_inside,
        unchanged=1 - int(changed.sum()) / changed.numel(),
        principal_overlap=principal.share,
        principal_enrichment=principal.enrichment,
        low_overlap=low.share,
        low_enrichment=low.enrichment,
        subspace=size,
    )


class _Pair(NamedTuple):
    """W0 (s x n, fp32) and its change, transposed where ``tall`` so that no side is shorter than its rows."""

    W: Tensor
    D: Update
    tall: bool

    @classmethod
    def of(cls, W: Tensor, D: Update) -> _Pair:
        tall = W.shape[0] > W.shape[1]
        return cls(W.mT, D.mT, tall) if tall else cls(W, D, tall)

    def long(self, U: Tensor) -> Tensor:
        """W0^T U in fp64."""
        parts = [self.W[:, i : i + LINES].double().mT @ U for i in range(0, self.W.shape[1], LINES)]
        return torch.cat(parts)

    def changed_long(self, U: Tensor) -> Tensor:
        """(W0 + D)^T U in fp64."""
        return self.long(U) + self.D.mT.times(U)

    def similarity(self, before: Spectrum, after: Spectrum, k: int) -> tuple[Tensor, Tensor]:
        """The largest |cosine| of each of the k leading left vectors of W1 to any of W0, and their singular values.
        Vectors of W0's null space are arbitrary, and not looked at."""
        U1 = after.vectors[:, :k]
        values1 = after.values[: U1.shape[1]]
        cosines = U1.mT @ before.vectors
        if self.tall:  # the left ones are of the long side: V1^T V0 = (W0 V1)^T U0 / sigma0
            W0V1 = DenseUpdate(self.W).times(self.changed_long(U1) / values1)
            cosines = W0V1.mT @ before.vectors / before.values[: before.rank]
        none = cosines.new_zeros(len(cosines), 1)  # of a W0 without any
        return torch.cat([cosines.abs(), none], dim=1).amax(dim=1).clamp(max=1), values1

    def angles(self, before: Spectrum, after: Spectrum, size: int) -> tuple[Tensor, Tensor]:
        """Principal angles of the leading subspaces, the left and the right ones."""
        U0, U1 = before.vectors[:, :size], after.vectors[:, :size]
        V0, V1 = self.long(U0) / before.values[:size], self.changed_long(U1) / after.values[:size]
        return self._sides(principal_angles(U0, U1), principal_angles(V0, V1))

    def inside(self, before: Spectrum, size: int, whole: float) -> tuple[float, float]:
        """Of |D|_F^2, ``whole``, what lies in the leading left and right subspaces of W0."""
        U0 = before.vectors[:, :size]
        V0 = self.long(U0) / before.values[:size]
        short, long = (float(part.square().sum()) for part in (self.D.mT.times(U0), self.D.times(V0)))
        return self._sides(min(1.0, ratio(short, whole)), min(1.0, ratio(long, whole)))

    def overlaps(self, before: Spectrum, size: int, changed: Tensor, alpha: float) -> tuple[Overlap, Overlap]:
        """Of the changed weights with the largest of W0's leading part, and with the smallest of W0."""
        U0 = before.vectors[:, :size].float()
        principal = overlap(changed, (U0 @ (U0.mT @ self.W)).abs_(), alpha)
        return principal, overlap(changed, self.W.abs().neg_(), alpha)

    def _sides(self, short: T, long: T) -> tuple[T, T]:
        return (long, short) if self.tall else (short, long)


def _most(angles: Tensor) -> float:
    return float(angles.max()) if len(angles) else 0.0


def _mean(angles: Tensor) -> float:
    return float(angles.mean()) if len(angles) else 0.0


def _check(W0: Tensor, W1: Tensor | LowRankUpdate, *, k: int, epsilon: float, subspace: int, alpha: float) -> None:
    require(W0.ndim == 2 and W0.numel() > 0, "W0 must be a matrix", tuple(W0.shape))
    shape = (W1.B.shape[0], W1.A.shape[1]) if isinstance(W1, LowRankUpdate) else tuple(W1.shape)
    require(shape == tuple(W0.shape), f"W1 must be {W0.shape[0]} x {W0.shape[1]} as W0 is", shape)
    if isinstance(W1, LowRankUpdate):
        require(
            W1.B.shape[1] == W1.A.shape[0], "B must have as many columns as A has rows", (W1.B.shape[1], W1.A.shape[0])
        )
    require(is_whole(k) and k >= 1, "k must be a whole number >= 1", k)
    require(is_real(epsilon) and 0 < epsilon <= 1, "epsilon must be a number in (0, 1]", epsilon)
    require(is_whole(subspace) and subspace >= 1, "subspace must be a whole number >= 1", subspace)
    require(is_real(alpha) and 0 < alpha < 1, "alpha must be a number in (0, 1)", alpha)
    tensors = {"W0": W0, **(W1._asdict() if isinstance(W1, LowRankUpdate) else {"W1": W1})}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds infinite or NaN weights; nothing can be said of them")
