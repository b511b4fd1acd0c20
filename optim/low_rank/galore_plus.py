"""GaLore+: a projector shared by the heads of a layer, found fast, and a sparse residual.  Liao et al. 2024,
arXiv:2412.19820.

The loop of ``galore.py`` with three additions, each with its own switch:

    num_heads = h         every T steps, one of the h heads i, drawn from a seed: P from G_i alone (m/h x n),
                          shared by all heads: R = G P, moments m x r; P: n x r, r at most m/h
    randomized            P by randomized subspace iteration, warm from the previous P
    residual_fraction     for t <= warm-up: which entries of each row (column, on the left) miss most
                              S <- the q = ceil(fraction * n) places with the largest sum of |G - R P^T|    m x q
                          then, at those entries
                              E   =  (G - R P^T)[S]                                                         m x q
                              N_E =  Adam(E)                                       with its own age, t - warm-up
                              W  <-  W - s * scale * (N P^T + scatter_S(N_E))

The full text of the paper does not say which heads' side is shared, how the support is chosen and how its moments are
corrected, so these are choices: P on the right, because r is about a head's size and the moments then need no
bookkeeping by head; a support of equally many entries in each line, found in one pass over the warm-up in memory of its
own size (sums are those of the candidates); bias correction from the support's own age, because new moments under
an old correction take a first step three times too large. Scores of the warm-up live in the residual's first moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import Check, number, require, whole
from ..core.batches import Direction, ask
from ..core.clock import steps_of, with_age
from ..core.rules import ADAM
from ..core.types import Group, State
from ..distributed import (
    Block,
    BlockedUpdate,
    FullMatrix,
    FullShard,
    LowRankUpdate,
    ProjectionSide,
    block_of,
    blocks,
    has_subspace,
)
from ..numbers import Number
from ..state.spec import INDICES, MOMENTS, Placement, StateSpec, moment_dtype
from .galore import GaLore
from .optimizer import LowRankOptimizer
from .singular import (
    Columns,
    PendingIteration,
    PendingRange,
    leading_singular_vectors,
    orthogonal_iteration,
    randomized_range,
)
from .sparse_residual import absorb_, first_support


class GaLorePlusAdamW(GaLore):
    """GaLore's AdamW, cross-head projector, randomized refresh and sparsely coded residual (arXiv:2412.19820).

    Groups without a ``rank`` get plain AdamW. ``param_groups(model, ..., num_heads={"q_proj": 32, "k_proj": 8})`` makes
    a group for each number of heads.

    Args:
        params, lr, betas, eps, weight_decay, rank, update_proj_gap, scale, shard_basis, state_dtype: as for
            ``GaLoreAdamW``.
        proj_type: as for ``GaLoreAdamW``; with ``num_heads`` P is always on the right.
        subspace_method: ``randomized``, or ``svd`` or ``iterate`` as for ``GaLoreAdamW``.
        num_heads: the rows of each matrix of the group are that many attention heads of equal size, and a refresh
            computes P from one of them; None computes it from the whole matrix.
        residual_fraction: part of a matrix's entries that the residual corrects; 0 drops the residual, as GaLore does.
        residual_warmup: steps before the entries are chosen.
        oversampling: columns beyond r in the randomized refresh.
        power_iterations: of the randomized refresh.
        seed: of the random numbers, with the parameter's position and the step.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: that of ``GaLoreAdamW`` and 3 * long * q numbers (int32 and two moments), q =
    ceil(residual_fraction * short).

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import GaLorePlusAdamW, param_groups
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "mlp": nn.Linear(64, 256)})
        >>> groups = param_groups(model, rank=8, target_modules=["q_proj", "mlp"], num_heads={"q_proj": 4})
        >>> optimizer = GaLorePlusAdamW(groups, lr=0.01)
        >>> model["mlp"](model["q_proj"](torch.randn(16, 64))).square().mean().backward()
        >>> optimizer.step()
        >>> {key: tuple(optimizer.state[model["q_proj"].weight][key].shape) for key in ("basis", "residual_places")}
        {'basis': (64, 8), 'residual_places': (64, 1)}
    """

    few_kernels = False
    spends_coordinates = False
    subspace_methods = ("randomized", *GaLore.subspace_methods)
    keeps_coordinates = False  # its residual is of all of the gradient
    later_keys: ClassVar[Mapping[str, Any]] = LowRankOptimizer.later_keys  # without turns, which are for coordinates
    checks: ClassVar[Mapping[str, Check]] = {
        "num_heads": whole(1, optional=True),
        "residual_fraction": number("in [0, 1]"),
        "residual_warmup": whole(1),
        "oversampling": whole(0),
        "power_iterations": whole(1),
        "seed": whole(0),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        subspace_method: str = "randomized",
        num_heads: int | None = None,
        residual_fraction: float = 0.01,
        residual_warmup: int = 100,
        oversampling: int = 8,
        power_iterations: int = 2,
        seed: int = 0,
        shard_basis: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        if group["num_heads"] is not None:
            proj_type = group["proj_type"]
            require(proj_type in ("std", "right"), "proj_type must be std or right where num_heads is set", proj_type)

    def check_shape(self, shape: tuple[int, ...], group: Group) -> None:
        super().check_shape(shape, group)
        heads = group["num_heads"]
        if heads is not None:
            require(shape[-2] % heads == 0, f"num_heads must divide the rows of each matrix, here {shape[-2]}", heads)

    # ---- the cross-head, randomized subspace --------------------------------------------------------------------

    def projection_side(self, shape: tuple[int, int], group: Group) -> ProjectionSide:
        if group["num_heads"] is None:
            return super().projection_side(shape, group)
        m, n = shape
        return ProjectionSide(shape, min(group["rank"], m // group["num_heads"], n), right=True)

    def find_basis(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Columns:
        side, step = shard.side, steps_of(state)
        seed = _mixed(group["seed"], shard.position, step)
        rows = slice(None)
        part = shard.own(G)
        if group["num_heads"] is not None:
            size = side.shape[0] // group["num_heads"]
            generator = torch.Generator("cpu").manual_seed(seed)
            head = torch.randint(group["num_heads"], (), generator=generator, device="cpu").item()
            rows = slice(int(head) * size, int(head + 1) * size)
            part = shard.own_rows(G, rows.start, rows.stop)
        previous = self.previous_columns(shard, group, state)
        if group["subspace_method"] == "svd":
            return shard.solve(G, lambda whole: leading_singular_vectors(whole[rows], side, previous))
        width, times = group["oversampling"], group["power_iterations"]
        if group["subspace_method"] == "iterate":
            if self.finds_stacked(shard):
                return PendingIteration(part, side, previous)
            return orthogonal_iteration(part, side, previous, shard.all_reduce_)
        if self.finds_stacked(shard):
            return PendingRange(part, side, previous, seed, width, times)
        return randomized_range(part, side, previous, seed, width, times, shard.all_reduce_)

    def why_not_captured(self, group: Group) -> str | None:
        if group["rank"] is not None and group["residual_fraction"] > 0:
            return "its residual has a warm-up, which the host counts; with residual_fraction=0 it can be True"
        return super().why_not_captured(group)

    # ---- the sparse residual ------------------------------------------------------------------------------------

    def basis_specs(self, shard: FullMatrix, group: Group) -> list[StateSpec]:
        specs = super().basis_specs(shard, group)
        if group["residual_fraction"] > 0:
            q = math.ceil(group["residual_fraction"] * shard.side.line_length - 1e-9)  # 0.07 * 100 is more than 7
            places = StateSpec("residual_places", (shard.side.lines, q), torch.int32, Placement.LINES, kind=INDICES)
            moments = (
                replace(places, name=f"residual_{key}", dtype=moment_dtype(shard, group), kind=MOMENTS)
                for key in ("exp_avg", "exp_avg_sq")
            )
            specs += [places, *moments]
        return specs

    def initialize(self, shard: FullShard, group: Group, state: State) -> None:
        super().initialize(shard, group, state)
        if has_subspace(shard) and "residual_places" in state:
            places = state["residual_places"]
            places.copy_(first_support(places.shape[0], places.shape[1], places.device))

    def low_rank_direction(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Direction:
        if group["residual_fraction"] == 0:
            return super().low_rank_direction(G, shard, group, state)
        return self._with_residual(G, shard, group, state)

    def _with_residual(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Direction:
        P = self.basis(shard, group, state)
        R = P.project(G)
        N, correction = yield R, state
        U = group["scale"] * P.lift(N)
        taken = -1.0 * P.lift(R)
        if shard.in_blocks():
            parts, missed = [_missed_in(block, taken, G, shard) for block in _blocks(shard)], None
        else:
            missed = taken.added_to(G, out=shard.spare(G))
            parts = [Missed(partial(_lines, missed, shard), lambda lined: lined)]
        entries = self._residual(parts, shard, group, state)
        if entries is None:
            return U, correction
        N_E, own_correction = entries
        values, places = N_E.mul_(group["scale"] * own_correction / correction), state["residual_places"]
        if missed is None:
            return BlockedUpdate(
                G.shape, partial(_corrected, U, values, places, shard), shard.side.line_axis
            ), correction
        dense = U.dense(out=missed)
        _lines(dense, shard).scatter_add_(-1, places.long(), values.to(dense.dtype))
        return dense, correction

    def _residual(
        self, missed: Sequence[Missed], shard: FullMatrix, group: Group, state: State
    ) -> tuple[Tensor, Number] | None:
        """N_E (lines x q) and its bias correction, or None during the warm-up."""
        support, scores = state["residual_places"], state["residual_exp_avg"]
        age = steps_of(state) - group["residual_warmup"]
        if age <= 0:
            for part in missed:
                absorb_(part.own(support), part.own(scores), part.lines().abs_().to(scores.dtype))
            if age == 0:
                support.copy_(support.sort(dim=-1).values)
                scores.zero_()
            return None
        moments = {"exp_avg": scores, "exp_avg_sq": state["residual_exp_avg_sq"]}
        found = [part.lines().gather(-1, part.own(support).long()) for part in missed]
        E = found[0] if len(found) == 1 else torch.cat(found)
        return ask(ADAM, E, with_age(moments, age), group, shard)


class Missed(NamedTuple):
    """What the subspace misses of some lines: how they are made (lines x line length), and what they have of tensors
    with a row for each line."""

    lines: Callable[[], Tensor]
    own: Callable[[Tensor], Tensor]


def _blocks(shard: FullMatrix) -> Iterator[Block]:
    return blocks(shard.block_shape, shard.side.line_axis)


def _missed_in(block: Block, taken: LowRankUpdate, G: Tensor, shard: FullMatrix) -> Missed:
    def lines() -> Tensor:
        return _lines(block_of(taken, block).added_to(block.of(G)), shard)

    return Missed(lines, replace(block, axis=0).of)


def _corrected(U: LowRankUpdate, values: Tensor, places: Tensor, shard: FullMatrix, block: Block) -> Tensor:
    """U and the values of the entries of the support, in a block."""
    dense = block_of(U, block).dense()
    own = replace(block, axis=0)
    _lines(dense, shard).scatter_add_(-1, own.of(places).long(), own.of(values).to(dense.dtype))
    return dense


def _lines(dense: Tensor, shard: FullMatrix) -> Tensor:
    """A view with a line in each row: rows on the right, columns on the left."""
    return dense if shard.side.right else dense.mT


def _mixed(*numbers: int) -> int:
    """One seed from several, the same in every process."""
    seed = 0
    for value in numbers:
        seed = (seed * 1_000_003 + value + 1) % 2**62
    return seed
