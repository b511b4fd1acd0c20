"""LDAdam: a new subspace at every step, moments and errors carried into it.  Robert et al. 2024, arXiv:2410.16103.

For a matrix W (m x n) with gradient G, the picture for m < n (``left``; transpose it for ``right``); M and V are of
the previous step, M^ and V^ are M / (1 - b1^(t-1)) and V / (1 - b2^(t-1)):

                     A   =  G + E                                             m x n    error feedback
    t = 1            P  <-  r leading left singular vectors of A              m x r    subspace
    t > 1            B   =  rho P_prev M^ + (1 - rho) A                                subspace: one power iteration
                     P  <-  qr(B B^T P_prev)
                     R   =  P^T A                                             r x n    project
                     C   =  P^T P_prev                                        r x r
                     E  <-  A - P R + b1 / (1 - b1) (P_prev M - P C M)        m x n    residual: error feedback
                     V  <-  (1 - b2^(t-1)) |(C * C)(V^ - M^ * M^) + (C M^) * (C M^)|   carry: rotate, as variances
                     M  <-  C M
                     M  <-  b1 M + (1 - b1) R;  V <- b2 V + (1 - b2) R * R    r x n    rule: Adam
                     N   =  M / (sqrt(V) + eps sqrt(1 - b2^t))
                     W  <-  W - lr * decay * W
                     W  <-  W - lr * sqrt(1 - b2^t) / (1 - b1^t) * P N

Nothing is lost: with X = P M,  X_t + (1 - b1) E_t+1 = b1 X_t-1 + (1 - b1) (G_t + E_t).

Departures from the authors' code: E is a tensor of its own in fp32, not what ``p.grad`` is left with, so gradients can
be zeroed, clipped, scaled and freed; the step is state, so a resumed run carries its moments on; B, which is m x n,
is never formed; a square matrix is projected from the right, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import Check, flag, number
from ..core.batches import Direction
from ..core.capture import NEVER
from ..core.clock import steps_of
from ..core.optimizer import FIND
from ..core.rules import TORCH_ADAM
from ..core.types import Group, State
from ..distributed import FullMatrix, FullShard, add_product_, blocks
from ..state.spec import ERRORS, Placement, StateSpec, basis_spec, wide_dtype
from .basis import Basis
from .optimizer import LowRankOptimizer
from .singular import leading_of_large, leading_singular_vectors, orthonormalized, times


class LDAdamW(LowRankOptimizer):
    """AdamW with low-dimensional moments, whose subspace follows the gradient at every step (arXiv:2410.16103).

    Groups without a ``rank`` get AdamW as torch has it.

    Args:
        params, rank, proj_type, shard_basis, state_dtype: as for ``GaLoreAdamW``.
        lr, eps, weight_decay: as for ``torch.optim.AdamW``.
        betas: Adam's; the authors use a shorter memory than usual.
        rho: share of the momentum in what the next subspace is found from.
        error_feedback: keep what the subspace misses and add it to the next gradient.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: ``(r * short + 2 * r * long)`` numbers and a counter, and with error feedback m * n.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import LDAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> optimizer = LDAdamW(param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> {key: tuple(tensor.shape) for key, tensor in optimizer.state[model[0].weight].items()}
        {'step': (), 'basis': (32, 4), 'error': (32, 64), 'exp_avg': (4, 64), 'exp_avg_sq': (4, 64)}
    """

    rule = TORCH_ADAM
    stack_copies = 2
    only_read = ()
    checks: ClassVar[Mapping[str, Check]] = {"rho": number("in [0, 1]"), "error_feedback": flag()}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        proj_type: str = "std",
        rho: float = 0.908,
        error_feedback: bool = True,
        shard_basis: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def basis_specs(self, shard: FullMatrix, group: Group) -> list[StateSpec]:
        dtype = wide_dtype(shard)  # transported at every step: bf16 would drift
        error = StateSpec("error", shard.side.shape, dtype, Placement.LINES, shard.side.line_axis, ERRORS)
        return [basis_spec(shard, dtype), *([error] if group["error_feedback"] else [])]

    def waits_for_gradient(self, group: Group) -> bool:
        return False

    def due_in(self, shard: FullShard, group: Group, state: State) -> int:
        return NEVER  # the subspace moves in ``low_rank_direction``, for the gradient and the error together

    def low_rank_direction(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Direction:
        previous = self.columns(shard, group, state).clone()
        A = state["error"].add_(G) if group["error_feedback"] else G if shard.in_blocks() else G.to(previous.dtype)
        with self.phase(FIND):
            side = shard.side
            if steps_of(state) == 1 and shard.in_blocks() and side.line_length <= side.lines:
                columns = leading_of_large(A, side)
            elif steps_of(state) == 1:
                columns = shard.solve(A, partial(leading_singular_vectors, side=shard.side)).result()
            else:
                columns = _next_columns(A, previous, shard, group, state)
            state["basis"].copy_(shard.shard_rows(columns))
        P = Basis(columns, shard.side)
        R = P.project(A)
        if group["error_feedback"]:
            (-1.0 * P.lift(R)).add_to_(A)
        if steps_of(state) > 1:
            _carry(_wide(A, shard) if group["error_feedback"] else None, previous, columns, shard, group, state)
        N, correction = yield R, state
        return P.lift(N), correction


def _wide(dense: Tensor, shard: FullMatrix) -> Tensor:
    """A view with the projected side first: short x long, or r x long."""
    return dense.mT if shard.side.right else dense


def _next_columns(A: Tensor, P: Tensor, shard: FullMatrix, group: Group, state: State) -> Tensor:
    """qr(B B^T P) for B = rho P M^ + (1 - rho) A, with A short x long and P short x r, B never formed."""
    rho, (beta1, _) = group["rho"], group["betas"]
    A, M = (_wide(shard.own(X), shard) for X in (A, state["exp_avg"]))
    M = M.to(P.dtype) / (1 - beta1 ** (steps_of(state) - 1))
    if A.dtype != P.dtype:  # of a large matrix, which is made wider in parts
        R = Basis(P, shard.side).project(A.mT if shard.side.right else A)
        Y = _wide(R, shard).mul_(1 - rho).add_(M, alpha=rho)
        times(A, Y.mT, out=(Z := torch.empty_like(P)))
    else:
        Y = (P.mT @ A).mul_(1 - rho).add_(M, alpha=rho)  # (B^T P)^T, r x long
        Z = A @ Y.mT
    Z = add_product_(Z.mul_(1 - rho), P, M @ Y.mT, rho)
    return orthonormalized(shard.all_reduce_(Z), P)


def _carry(E: Tensor | None, previous: Tensor, P: Tensor, shard: FullMatrix, group: Group, state: State) -> None:
    """M and V (r x long) rotated into the new subspace; what M loses goes to E (short x long)."""
    C = P.mT @ previous
    t = steps_of(state) - 1
    held = _wide(state["exp_avg"], shard), _wide(state["exp_avg_sq"], shard)
    if not shard.in_blocks():
        M, V = held
        _carry_lines(E, M, V, C, previous, P, group, t)
        return
    for block in blocks((shard.side.line_length, shard.side.lines), axis=1):
        M, V = map(block.of, held)
        _carry_lines(None if E is None else block.of(E), M, V, C, previous, P, group, t)


def _carry_lines(
    E: Tensor | None, M: Tensor, V: Tensor, C: Tensor, previous: Tensor, P: Tensor, group: Group, t: int
) -> None:
    """``_carry`` of some lines, from step t."""
    beta1, beta2 = group["betas"]
    held = M, V
    M, V = (moment.to(P.dtype) for moment in held)
    rotated = C @ M
    if E is not None:
        add_product_(E, previous, M, beta1 / (1 - beta1))
        add_product_(E, P, rotated, -beta1 / (1 - beta1))
    first, second = 1 - beta1**t, 1 - beta2**t
    spread = C.square() @ (V / second).sub_((M / first).square_())
    held[1].copy_(spread.add_((rotated / first).square_()).abs_().mul_(second))
    held[0].copy_(rotated)
