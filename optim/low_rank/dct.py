"""DCT-AdamW: Adam in the best r columns of a fixed cosine basis.  Modoranu et al. 2025, arXiv:2505.17967.

For a matrix W (m x n) with gradient G, the picture for m >= n (``right``; transpose it for ``left``):

                     Q   :  one orthogonal cosine matrix for all               n x n    fixed, shared
                     W  <-  W - lr * decay * W
                     A   =  G + E                                              m x n    error feedback
    every T steps    i  <-  the r columns of A Q with the largest norms        r        subspace
                     M, V <- their columns moved along with i                  m x r    carry: a gather
                     P   =  Q[:, i]
                     R   =  A P                                                m x r    project
                     E  <-  A - R P^T                                          m x n    residual: error feedback
                     M  <-  b1 M + (1 - b1) R;  V <- b2 V + (1 - b2) R * R     m x r    rule: Adam
                     N   =  M / (sqrt(V) + eps sqrt(1 - b2^t))
                     W  <-  W - lr * sqrt(1 - b2^t) / (1 - b1^t) * N P^T

Old and new columns are columns of one orthogonal matrix, so the change of basis that the authors' code multiplies by is
a gather: a column that stays keeps its moments, one that leaves loses them, one that comes starts from zero.

By default, as in the authors' code, moments do not move: they belong to the places of columns, of which the first has
the largest score (the authors' are in whatever order ``topk`` returns). With ``rotate_subspace`` a column that comes
has moments of zero, and its first steps are several times as large as Adam's. After 200 steps of the quickstart with
a choice at every step, at learning rates of 0.01 and 0.005: places in the order of the scores 4.897 and 4.985, in
that of the columns 5.093 and 5.037, moments that move 5.554 and 5.601, and with bias corrections by each column's own
age 5.621 and 5.745.

Departures from the authors' code: Q is built with whole-number phases, in fp32 also for bf16
gradients (and for fp64 ones); the gradient is not used as scratch; ties are broken by index; betas, eps and step live
in groups and state. Error feedback in 8 or 4 bits has a minimum and a step for each line: row, or column on the left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import Check, flag, is_whole, one_of, require
from ..core.batches import Direction
from ..core.capture import NEVER
from ..core.clock import steps_of
from ..core.optimizer import FIND
from ..core.rules import TORCH_ADAM
from ..core.types import Group, ParamStep, State
from ..distributed import (
    Block,
    FullMatrix,
    FullShard,
    LowRankUpdate,
    ProjectionSide,
    block_of,
    blocks,
    has_subspace,
)
from ..state.packed_rows import pack_, packed_specs, unpacked
from ..state.spec import ERRORS, INDICES, Placement, StateSpec
from .basis import Basis
from .cosine import best_columns, column_scores, cosine_basis, kept_places
from .optimizer import LowRankOptimizer

ERROR_BITS = {"fp32": 32, "8bit": 8, "4bit": 4}


def _norm(key: str, value: object) -> None:
    require(is_whole(value) and value in (1, 2), f"{key} must be 1 or 2", value)


class DCTAdamW(LowRankOptimizer):
    """AdamW in r columns of a cosine basis, chosen again as often as at every step, without any SVD (arXiv:2505.17967).

    Groups without a ``rank`` get AdamW as torch has it.

    Args:
        params, betas, proj_type, state_dtype: as for ``GaLoreAdamW``.
        lr, eps, weight_decay: as for ``torch.optim.AdamW``.
        rank: r, the number of columns; None gives a group plain AdamW. Capped at min(m, n).
        update_proj_gap: T, steps between choices of the columns: at steps 1, T, 2T, ...
        ell_norm: columns are ranked by their 1- or 2-norm.
        rotate_subspace: moments follow their columns; one that comes begins with none, under a bias correction that is
            over. False, as the authors have it, leaves moments to the places, in the order of the scores.
        error_feedback: what the subspace misses is added to the next gradient: None, or kept as ``fp32``, ``8bit`` or
            ``4bit``.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: ``2 * r * long`` numbers, r int32, a counter, and with error feedback m * n fp32, or m * n
    bytes or half of them and ``8 * long`` more. All matrices share one fp32 k x k cosine matrix for each distinct side
    k, which is not state.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import DCTAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> groups = param_groups(model, rank=4, target_modules="all-linear", error_feedback="8bit")
        >>> optimizer = DCTAdamW(groups, lr=0.01)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> {key: tuple(optimizer.state[model[0].weight][key].shape) for key in ("indices", "exp_avg", "error")}
        {'indices': (4,), 'exp_avg': (4, 64), 'error': (64, 32)}
        >>> DCTAdamW.state_bytes_for((4096, 4096), rank=128)  # no basis is kept; GaLoreAdamW: 6291460
        4194820
    """

    rule = TORCH_ADAM
    captures = True
    stack_copies = 2
    only_read = ()
    checks: ClassVar[Mapping[str, Check]] = {
        "ell_norm": _norm,
        "rotate_subspace": flag(),
        "error_feedback": one_of(*ERROR_BITS, optional=True),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 1,
        proj_type: str = "std",
        ell_norm: int = 1,
        rotate_subspace: bool = False,
        error_feedback: str | None = None,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def basis_specs(self, shard: FullMatrix, group: Group) -> list[StateSpec]:
        side, feedback = shard.side, group["error_feedback"]
        specs = [StateSpec("indices", (side.rank,), torch.int32, kind=INDICES)]
        if feedback == "fp32":
            specs.append(StateSpec("error", side.shape, torch.float32, Placement.LINES, side.line_axis, ERRORS))
        elif feedback is not None:
            bits = ERROR_BITS[feedback]
            specs += packed_specs("error", side.lines, side.line_length, bits, Placement.LINES, ERRORS)
        return specs

    def initialize(self, shard: FullShard, group: Group, state: State) -> None:
        if has_subspace(shard):
            torch.arange(shard.side.rank, out=state["indices"], device=state["indices"].device)

    def why_not_captured(self, group: Group) -> str | None:
        if group["rank"] is not None and group["update_proj_gap"] > 1:
            return "in some steps it chooses columns, in others not; with update_proj_gap=1 it can be True"
        return super().why_not_captured(group)

    def waits_for_gradient(self, group: Group) -> bool:
        return bool(group["update_proj_gap"] > 1)  # with 1 the next step chooses anyhow

    def due_in(self, shard: FullShard, group: Group, state: State) -> int:
        return NEVER

    def batch_kind(self, item: ParamStep) -> object:
        return self.waited_for_gradient(item.shard)

    def find(self, work: list[ParamStep]) -> None:
        """The cosines alone, which no graph makes; columns are chosen in ``low_rank_direction``, for the gradient and
        the error together."""
        for item in work:
            if has_subspace(item.shard):
                cosine_basis(item.shard.side.basis_shape[0], item.shard.device)

    def columns(self, shard: FullMatrix, group: Group, state: State) -> Tensor:
        Q = cosine_basis(shard.side.basis_shape[0], shard.device)
        i = state["indices"]
        return Q.index_select(1, i.flatten()).view(len(Q), *i.shape).movedim(0, -2)

    def low_rank_direction(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Direction:
        A = self._with_error(G, shard, group, state)
        if group["update_proj_gap"] == 1 or self._is_chosen_now(shard, group, steps_of(state)):
            with self.phase(FIND):
                self._choose_columns(A, shard, group, state)
        P = self.basis(shard, group, state)
        R = A.project(P) if isinstance(A, PackedInBlocks) else P.project(A)
        self._keep_error(A, R, P, shard, group, state)
        N, correction = yield R, state
        return P.lift(N), correction

    def _is_chosen_now(self, shard: FullMatrix, group: Group, t: int) -> bool:
        return t == 1 or t % group["update_proj_gap"] == 0 or self.waited_for_gradient(shard)

    def _choose_columns(self, A: Tensor | PackedInBlocks, shard: FullMatrix, group: Group, state: State) -> None:
        side = shard.side
        k = side.basis_shape[0]
        Q, p = cosine_basis(k, shard.device), group["ell_norm"]
        if isinstance(A, PackedInBlocks):
            scores = A.scores(Q, p)
        else:
            scores = shard.all_reduce_(column_scores(shard.own(A), Q, side, p))
        del Q  # where it is planned, it is made anew
        chosen = best_columns(scores, side.rank)
        if group["rotate_subspace"]:
            place, kept = kept_places(state["indices"], chosen, k)
            axis = -1 if side.right else -2
            place, kept = (of_columns.unsqueeze(-2 if side.right else -1) for of_columns in (place, kept))
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(torch.take_along_dim(state[key], place, axis).mul_(kept))
        state["indices"].copy_(chosen)
        if self.waits_for_gradient(group):
            seen = A.G if isinstance(A, PackedInBlocks) else A
            self.look_at_gradient(seen, shard, torch.isfinite(scores).all(-1))

    def _with_error(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Tensor | PackedInBlocks:
        """A (m x n). Without feedback it is the gradient, with that of fp32 the error buffer itself."""
        feedback = group["error_feedback"]
        if feedback is None:
            return G
        if feedback == "fp32":
            return state["error"].add_(G)
        right = shard.side.right
        shard.workspace.clear()
        if shard.in_blocks():
            return PackedInBlocks(G, shard.side, state, ERROR_BITS[feedback])
        E = unpacked("error", state, G.shape[-1 if right else -2], ERROR_BITS[feedback])
        return (E if right else E.mT).add_(G)

    def _keep_error(
        self, A: Tensor | PackedInBlocks, R: Tensor, P: Basis, shard: FullMatrix, group: Group, state: State
    ) -> None:
        feedback = group["error_feedback"]
        if feedback is None:
            return
        if isinstance(A, PackedInBlocks):
            A.keep(-1.0 * P.lift(R))
            return
        (-1.0 * P.lift(R)).add_to_(A)
        if feedback != "fp32":
            pack_("error", A if shard.side.right else A.mT, ERROR_BITS[feedback], state)


class PackedInBlocks:
    """A large gradient with the error that is kept in 8 or 4 bits, which is unpacked again for all that it is for."""

    def __init__(self, G: Tensor, side: ProjectionSide, state: State, bits: int) -> None:
        self.G, self.side, self.state, self.bits = G, side, state, bits

    def _by_lines(self) -> Iterator[tuple[Block, Tensor, dict[str, Tensor]]]:
        """Blocks of lines, A in them, and the packed rows that they have."""
        for block in blocks(self.side.shape, self.side.line_axis):
            rows = replace(block, axis=0)
            held = {key: rows.of(own) for key, own in self.state.items() if key.startswith("error")}
            E = unpacked("error", held, self.side.line_length, self.bits)
            yield block, (E if self.side.right else E.mT).add_(block.of(self.G)), held

    def scores(self, Q: Tensor, p: int) -> Tensor:
        """``column_scores``."""
        scores = torch.zeros(len(Q), dtype=Q.dtype, device=Q.device)
        for _, A, _ in self._by_lines():
            scores += column_scores(A, Q, self.side, p)
        return scores

    def project(self, P: Basis) -> Tensor:
        R = P.columns.new_empty(self.side.projected_shape)
        for block, A, _ in self._by_lines():
            block.of(R).copy_(P.project(A))
        return R

    def keep(self, taken: LowRankUpdate) -> None:
        """A + ``taken``, as the error of this step."""
        for block, A, held in self._by_lines():
            block_of(taken, block).add_to_(A)
            pack_("error", A if self.side.right else A.mT, self.bits, held)
