"""The change D of a matrix, held whole or as the factors of a low-rank product."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .decomposition import LINES, gram


class Update(Protocol):
    """D, m x n, of a matrix W0."""

    @property
    def mT(self) -> Update: ...

    def times(self, X: Tensor) -> Tensor:
        """D X in fp64, for an n x k matrix X in fp64."""
        ...

    def rows(self, begin: int, end: int) -> Tensor:
        """Some rows of D in fp32."""
        ...

    def gram_of_sum(self, W0: Tensor, G0: Tensor) -> Tensor:
        """(W0 + D)(W0 + D)^T in fp64, where G0 is W0 W0^T."""
        ...

    def singular_values(self) -> Tensor:
        """Those of D, in fp64 and falling; zeros may be left out."""
        ...

    def shuffled(self, generator: torch.Generator) -> Update:
        """D with rows and columns permuted and their signs drawn: the same singular values in other directions."""
        ...


class DenseUpdate:
    """D = W1 - W0 in fp32."""

    def __init__(self, D: Tensor) -> None:
        self.D = D

    @property
    def mT(self) -> DenseUpdate:
        return DenseUpdate(self.D.mT)

    def times(self, X: Tensor) -> Tensor:
        lines = range(0, len(self.D), LINES)
        return torch.cat([self.rows(i, i + LINES).double() @ X for i in lines])

    def rows(self, begin: int, end: int) -> Tensor:
        return self.D[begin:end]

    def gram_of_sum(self, W0: Tensor, G0: Tensor) -> Tensor:
        return gram(W0 + self.D)

    def singular_values(self) -> Tensor:
        short = self.D if self.D.shape[0] <= self.D.shape[1] else self.D.mT
        return torch.linalg.eigvalsh(gram(short)).clamp(min=0).sqrt().flip(0)

    def shuffled(self, generator: torch.Generator) -> DenseUpdate:
        m, n = self.D.shape
        (rows, row_signs), (columns, column_signs) = (_shuffle(size, generator, self.D) for size in (m, n))
        return DenseUpdate(self.D[rows][:, columns] * row_signs[:, None] * column_signs)


class LowRankUpdate(NamedTuple):
    """An update B A of an m x n matrix, as LoRA holds it; its scale belongs into one of the factors.

    Args:
        B: m x r.
        A: r x n.

    Example:
        >>> from gracile.spectra import LowRankUpdate, compare
        >>> update = LowRankUpdate(torch.randn(64, 2), torch.randn(2, 48))
        >>> round(compare(torch.randn(64, 48), update).effective_rank) <= 2
        True
    """

    B: Tensor
    A: Tensor

    @property
    def mT(self) -> LowRankUpdate:
        """Its transpose."""
        return LowRankUpdate(self.A.mT, self.B.mT)

    def times(self, X: Tensor) -> Tensor:
        """As for ``Update``: two thin products."""
        return self.B.double() @ (self.A.double() @ X)

    def rows(self, begin: int, end: int) -> Tensor:
        """As for ``Update``."""
        return self.B[begin:end].float() @ self.A.float()

    def gram_of_sum(self, W0: Tensor, G0: Tensor) -> Tensor:
        """As for ``Update``: W0 + B A is not formed."""
        B, A = self.B.double(), self.A.double()
        crossed = _times_transposed(W0, A) @ B.mT
        return G0 + crossed + crossed.mT + B @ (A @ A.mT) @ B.mT

    def singular_values(self) -> Tensor:
        """As for ``Update``: of the r x r product of the factors' triangles."""
        triangles = [torch.linalg.qr(factor.double(), mode="r").R for factor in (self.B, self.A.mT)]
        return torch.linalg.svdvals(triangles[0] @ triangles[1].mT)

    def shuffled(self, generator: torch.Generator) -> LowRankUpdate:
        """As for ``Update``, by the rows of B and the columns of A."""
        (rows, row_signs), (columns, column_signs) = (
            _shuffle(size, generator, self.B) for size in (self.B.shape[0], self.A.shape[1])
        )
        return LowRankUpdate(self.B[rows] * row_signs[:, None], self.A[:, columns] * column_signs)


def _times_transposed(W: Tensor, A: Tensor) -> Tensor:
    return torch.cat([W[i : i + LINES].double() @ A.mT for i in range(0, len(W), LINES)])


def _shuffle(size: int, generator: torch.Generator, like: Tensor) -> tuple[Tensor, Tensor]:
    """An order of ``size`` lines, and a sign for each."""
    order = torch.randperm(size, generator=generator)
    signs = 2.0 * torch.randint(2, (size,), generator=generator) - 1
    return order.to(like.device), signs.to(like.device, like.dtype)
