"""SaRA's penalty: the nuclear norm of what is trained, of one random matrix a step, so that the change is of low rank.

    G[M] <- G[M] + lambda_r (U V^T)[M],    U S V^T the singular vectors of D with a singular value that is not zero
    D     =  W - W0 in M, zero elsewhere                     or W in M, as the authors' code has it

Added to gradients between backward and step, on any loss. Departure: every ``every`` steps, for a decomposition of a
large matrix costs more than a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim.distributed import held_shard
from ..optim.sparse.selected import Selection
from ..rng import generator_of
from ..validation import number, one_of, require, whole

LEAST_SIDE = 65  # of the matrices that the authors penalise


class _Trained(NamedTuple):
    parameter: Tensor
    indices: Tensor
    start: Tensor


class NuclearPenalty:
    """Adds the subgradient of the nuclear norm of one matrix to its gradient.

    Args:
        groups: as ``selection_groups`` gives them, before an optimizer has them; the weights as they are then are W0.
        weight: lambda_r.
        of: ``delta``, the change of the weights in the mask; or ``weights``, these themselves.
        every: steps from one to the next.
        least_side: matrices with a smaller side are left out.
        seed: of the choice of matrices.

    Raises:
        ValueError: for a value out of range, groups without selections, no matrix of that size, or a split one.

    Example:
        >>> from torch import nn
        >>> from gracile.optim import SparseAdamW
        >>> from gracile.selections import NuclearPenalty, SaRA
        >>> model = nn.Linear(80, 80)
        >>> groups = SaRA(share=0.1).groups(model)
        >>> penalty, optimizer = NuclearPenalty(groups), SparseAdamW(groups, lr=1e-3)
        >>> for step in range(2):
        ...     model(torch.randn(4, 80)).square().mean().backward()
        ...     penalty.add_(step)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        weight: float = 5e-4,
        of: str = "delta",
        every: int = 1,
        least_side: int = LEAST_SIDE,
        seed: int = 0,
    ) -> None:
        checks = {"weight": number(">= 0"), "of": one_of("delta", "weights"), "every": whole(1)}
        checks |= {"least_side": whole(1), "seed": whole(0)}
        for key, check in checks.items():
            check(key, {"weight": weight, "of": of, "every": every, "least_side": least_side, "seed": seed}[key])
        self.weight, self.of, self.every, self.seed = weight, of, every, seed
        found = [item for group in groups for item in dict(group.get("selected") or {}).items()]
        require(bool(found), "groups must be those of selection_groups, with selections", found)
        self._trained = [_trained(p, own) for p, own in found if p.dim() == 2 and min(p.shape) >= least_side]
        require(bool(self._trained), "least_side must leave a matrix", least_side)

    def matrix_at(self, step: int) -> Tensor | None:
        """The matrix that is penalised at a step; None at those between."""
        if step % self.every:
            return None
        chosen = torch.randint(len(self._trained), (1,), generator=generator_of("nuclear", self.seed, step))
        return self._trained[int(chosen)].parameter

    @torch.no_grad()
    def add_(self, step: int) -> None:
        """Add to the gradients of this step, which ``backward`` has made.

        Args:
            step: its number, the same on every process.
        """
        p = self.matrix_at(step)
        if p is None or p.grad is None:
            return
        own = next(own for own in self._trained if own.parameter is p)
        values = p.view(-1).index_select(0, own.indices).float()
        D = torch.zeros(p.shape, device=p.device)
        D.view(-1)[own.indices.long()] = values - own.start.float() if self.of == "delta" else values
        subgradient = polar_factor(D).view(-1).index_select(0, own.indices)
        p.grad.view(-1).index_add_(0, own.indices, subgradient.to(p.grad.dtype), alpha=self.weight)


def polar_factor(matrix: Tensor) -> Tensor:
    """U V^T of the singular vectors whose singular value is not zero, in the matrix's rounding: the subgradient of the
    nuclear norm that has the least norm.

    Args:
        matrix: m x n.
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    least = S[0] * max(matrix.shape) * torch.finfo(S.dtype).eps
    return (U * (least < S)) @ Vh


def _trained(p: Tensor, selection: Selection) -> _Trained:
    shard = held_shard(p)
    require(
        not shard.split, "the nuclear norm needs whole matrices; leave it out under ZeRO 3 and FSDP2", tuple(p.shape)
    )
    flat = p.detach().view(-1)
    indices = selection.places(0, flat, tuple(p.shape))
    return _Trained(p, indices, flat.index_select(0, indices))
