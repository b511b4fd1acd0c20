"""WGSEF: AdamW and the proximal map of a group sparse envelope.  Refael et al., "Learning Structured Sparse Neural
Networks Using Group Envelope Regularization", after Beck & Refael 2022.

For a matrix W (m x n) in J groups, its rows, its columns or square blocks, of which k = keep * J shall stay:

    W    <- AdamW(G)
    v_j  =  the norm of W on group j,   d_j = how many weights are in it
    lam  =  lr * wgsef_lambda * min(1, t / ramp_steps)
    W_j  <- W_j u_j / (u_j + lam d_j),   sum u = k                 the proximal map of lam E_k: k_support
    after step finish_at
    W_j  <- 0 for all but the k groups with the largest v_j; then AdamW, and they stay zero

The map shrinks all groups, those most that are small, and need not leave k in one step: the last choice is hard. Ties
go to the lowest group.

Sources: abstract and reviews; the map is derived from the envelope's definition, and d, the ramp and the last choice
are ours. The map is that of plain gradient steps of lr: Adam's have another metric, of which it knows nothing. It is
of lr * lam, so that without a learning rate nothing moves.

Norms are summed in fp64 and rounded to fp32, so that a choice does not depend on how a matrix is split. One message a
step has the parts of all matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from ...fp64 import widest
from ...validation import Check, number, one_of, whole
from ..core import batches
from ..core.clock import steps_of
from ..core.group_checks import check_contiguous
from ..core.optimizer import FIND
from ..core.rules import TORCH_ADAM
from ..core.types import Group, ParamStep, State
from ..distributed import FullShard, PieceOfFull, UnsupportedLayout, all_reduce_shares_, is_large
from .experts import EXPERTS, Expert, experts_of
from .frozen_zeros import adamw_, keep_only_
from .group_envelope import proximal_factors
from .lots import Lot, MovedInLots, adamw_lot_

PARTS, PARTS_OF_LARGE = 4, 16  # in which a matrix is squared
GROUPS = ("rows", "columns", "blocks")


class WGSEFAdamW(MovedInLots):
    """AdamW that prunes whole rows, columns or blocks of matrices in groups with a ``keep`` (Refael et al.).

    The paper is "Learning Structured Sparse Neural Networks Using Group Envelope Regularization".

    Args:
        params: parameters, named parameters or groups; a group with a ``keep`` holds matrices only. Others get plain
            AdamW.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        keep: the share of each matrix's rows, columns or blocks that is kept, at least one; None for no pruning.
        groups: what is pruned together: ``rows``, ``columns`` or ``blocks``.
        block_size: rows and columns of a block; blocks at the ends are smaller.
        wgsef_lambda: strength of the envelope, which shrinks small groups most.
        ramp_steps: steps in which it rises from zero.
        finish_at: steps after which all but the share ``keep`` is set to zero for good; None for never.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: ``2 * m * n`` elements and a counter. Pruned groups are known by being zero.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key, a value out of range or a parameter that
            is no matrix in a group with a ``keep``.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import WGSEFAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> groups = param_groups(model, keep=0.25, target_modules=["0"])
        >>> optimizer = WGSEFAdamW(groups, lr=0.01, groups="rows", finish_at=2)
        >>> for _ in range(2):
        ...     model(torch.randn(16, 64)).square().mean().backward()
        ...     optimizer.step()
        >>> int(model[0].weight.any(dim=1).sum())  # rows of 32 that are not zero
        8
    """

    rule = TORCH_ADAM
    matrix_key = "keep"
    checks: ClassVar[Mapping[str, Check]] = {
        "keep": number("in (0, 1]", optional=True),
        "groups": one_of(*GROUPS),
        "block_size": whole(1),
        "ramp_steps": whole(0),
        "wgsef_lambda": number(">= 0"),
        "finish_at": whole(1, optional=True),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        keep: float | None = None,
        groups: str = "rows",
        block_size: int = 16,
        wgsef_lambda: float = 1e-3,
        ramp_steps: int = 1000,
        finish_at: int | None = None,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def check_parameters(self, parameters: Sequence[Tensor], group: Group) -> None:
        if group["keep"] is not None:
            check_contiguous(parameters)

    def check_shape(self, shape: tuple[int, ...], group: Group) -> None:
        if len(shape) not in (2, EXPERTS):
            raise ValueError(
                f"keep={group['keep']} needs matrices, got a parameter of shape {shape}; put it into a "
                "group without a keep"
            )

    # ---- a step -------------------------------------------------------------------------------------------------

    def update(self, G: Tensor, shard: FullShard, group: Group, state: State) -> None:
        if group["keep"] is None:
            super().update(G, shard, group, state)
        else:
            adamw_(shard, group, state, hold=_is_finished(group, state))

    def is_plain(self, group: Group, state: State) -> bool:
        return not _is_finished(group, state)

    def move_lot(self, lot: Lot) -> None:
        adamw_lot_(self, lot, hold=True)

    def after_step(self, work: list[ParamStep]) -> None:
        """The proximal map, or the last choice, of all matrices together."""
        due = [item for item in work if item.group["keep"] is not None and not _is_finished(item.group, item.state)]
        if due:
            with self.phase(FIND):
                self._shrink(due)

    def _shrink(self, due: list[ParamStep]) -> None:
        matrices = [Tiled(item, Tiles.of(own.shard, item.group), own) for item in due for own in experts_of(item.shard)]
        squares = squares_of(matrices)
        all_reduce_shares_([(own.expert.shard, part) for own, part in zip(matrices, squares, strict=True)])
        values: dict[int, list[tuple[Tiled, Tensor]]] = {}
        for alike in _alike(matrices):
            norms = torch.stack([squares[i].view(-1) for i in alike]).sqrt_().float()
            found = _values(norms, matrices[alike[0]])
            for i, own in zip(alike, [] if found is None else found, strict=found is not None):
                values.setdefault(id(matrices[i].item), []).append((matrices[i], own))
        for item in due:
            last = _is_last(item)
            own_values = values.get(id(item), [])
            if not last and item.group["stochastic_rounding"] and not item.shard.split and is_large(item.shard.shape):
                self._multiply_in_bands(item, own_values)
                continue
            with nullcontext() if last else self.rounded_weights(item, "shrunk"):
                for matrix, own in own_values:
                    W = item.shard.parameter.view(-1)[matrix.expert.begin : matrix.expert.end]
                    W = W.view(matrix.expert.shard.parameter.shape)
                    if last:
                        keep_only_(W, matrix.tiles.each(own, matrix.expert.shard))
                    else:
                        matrix.tiles.multiply_(W, own, matrix.expert.shard)

    def _multiply_in_bands(self, item: ParamStep, found: Iterable[tuple[Tiled, Tensor]]) -> None:
        """``multiply_`` of large matrices whose weights are wider for it."""
        for (_, tiles, expert), values in found:
            for first, last in tiles.bands(0, tiles.shape[0]):
                rows, n = last - first, tiles.shape[1]
                begin = expert.begin + first * n
                piece = PieceOfFull(item.shard, slice(begin, begin + rows * n))
                with self.rounded_weights(replace(item, shard=piece), "shrunk"):
                    own = tiles.of_rows(values, first, last)
                    Tiles((rows, n), (min(tiles.tile[0], rows), tiles.tile[1])).multiply_(
                        piece.parameter.view(rows, n), own, piece
                    )


class Tiled(NamedTuple):
    """One of a parameter's matrices, as tiles."""

    item: ParamStep
    tiles: Tiles
    expert: Expert


def _alike(matrices: Sequence[Tiled]) -> list[list[int]]:
    """The numbers of those matrices that are looked at together: on a GPU those of one group and grid, else each."""
    found: dict[tuple[object, ...], list[int]] = {}
    for i, (item, tiles, expert) in enumerate(matrices):
        device = expert.shard.device
        kind = (id(item.group), steps_of(item.state), tiles) if batches.launches_cost(device) else (i,)
        found.setdefault((*kind, device), []).append(i)
    return list(found.values())


def squares_of(matrices: Sequence[Tiled]) -> list[Tensor]:
    """``Tiles.squares`` of each; on a GPU of several that are whole, as far as a workspace has room for them."""
    lots: dict[tuple[object, ...], list[int]] = {}
    found: dict[int, Tensor] = {}

    def sum_up(lot: list[int]) -> None:
        tiles = matrices[lot[0]].tiles
        sums = tiles.squares_of_all(torch.stack([matrices[i].expert.shard.parameter.detach() for i in lot]))
        found.update(zip(lot, sums, strict=True))

    for i, (_, tiles, expert) in enumerate(matrices):
        W, size = expert.shard.parameter, expert.shard.parameter.numel()
        if expert.shard.split or not batches.launches_cost(W.device) or 2 * size > batches.AT_ONCE:
            found[i] = tiles.squares(expert.shard)
            continue
        lot = lots.setdefault((tiles, W.dtype, W.device), [])
        if 2 * (len(lot) + 1) * size > batches.AT_ONCE:  # they and their squares
            sum_up(lot)
            lot.clear()
        lot.append(i)
    for lot in lots.values():
        sum_up(lot)
    return [found[i] for i in range(len(matrices))]


def _values(norms: Tensor, matrix: Tiled) -> Tensor | None:
    """Of matrices that are alike, by the norms of their groups (B x J): what each group is multiplied by, in the end
    whether it is kept. None where nothing moves."""
    item = matrix.item
    k = max(1, round(item.group["keep"] * norms.shape[-1]))
    if _is_last(item):
        return largest(norms, k)
    lam = _strength(item)
    if lam <= 0:
        return None
    return proximal_factors(norms, matrix.tiles.sizes(norms.device).view(-1), k, lam).to(norms.dtype)


def _is_last(item: ParamStep) -> bool:
    return bool(steps_of(item.state) == item.group["finish_at"])


def _is_finished(group: Group, state: State) -> bool:
    """Whether groups were chosen in an earlier step."""
    return group["finish_at"] is not None and steps_of(state) > group["finish_at"]


def _strength(item: ParamStep) -> float:
    group = item.group
    risen = min(1.0, steps_of(item.state) / group["ramp_steps"]) if group["ramp_steps"] else 1.0
    return float(group["lr"] * group["wgsef_lambda"] * risen)


def largest(norms: Tensor, k: int) -> Tensor:
    """Which of J are the ``k`` largest (bool, ... x J), ties to the lowest index."""
    order = norms.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(norms, dtype=torch.bool).scatter_(-1, order, True)


class Tiles(NamedTuple):
    """An m x n matrix as an M x N grid of tiles of b x c weights; the last ones are smaller."""

    shape: tuple[int, int]
    tile: tuple[int, int]

    @classmethod
    def of(cls, shard: FullShard, group: Group) -> Tiles:
        if len(shard.shape) != 2:
            raise UnsupportedLayout(f"a matrix came as a tensor of shape {shard.shape}, without rows")
        m, n = shard.shape
        b = group["block_size"]
        return cls((m, n), {"rows": (1, n), "columns": (m, 1), "blocks": (min(b, m), min(b, n))}[group["groups"]])

    @property
    def grid(self) -> tuple[int, int]:
        (m, n), (b, c) = self
        return -(-m // b), -(-n // c)

    def sizes(self, device: torch.device) -> Tensor:
        """How many weights each tile has (M x N, fp64)."""
        sides = [_sides(whole, part, device) for whole, part in zip(self.shape, self.tile, strict=True)]
        return sides[0][:, None] * sides[1]

    def squares(self, shard: FullShard) -> Tensor:
        """This process's part of the sum of squares over each tile (M x N, fp64)."""
        (_, n), (b, c) = self
        W = shard.parameter.detach().reshape(-1)
        sums = torch.zeros(self.grid, dtype=widest(W.device), device=W.device)
        first, last, lead, tail = self._lines(shard)
        for begin, end in self.bands(first, last):
            a, z = (begin - first) * n - lead, (end - first) * n - lead
            own = W[max(a, 0) : z].to(torch.promote_types(W.dtype, torch.float32)).square()
            rows = F.pad(own, (max(-a, 0), tail if end == last else 0)).view(end - begin, n)
            inside = end - begin < b and begin // b == (end - 1) // b  # of one row of tiles
            above, below = (0, 0) if inside else (begin % b, -end % b)
            rows = F.pad(rows, (0, -n % c, above, below))
            tiles = rows.view(-1, len(rows) if inside else b, self.grid[1], c)
            sums[begin // b : begin // b + len(tiles)] += tiles.sum((1, 3), dtype=sums.dtype)
        return sums

    def squares_of_all(self, weights: Tensor) -> Tensor:
        """``squares`` of several whole matrices (B x m x n): B x M x N."""
        (m, n), (b, c) = self
        own = weights.to(torch.promote_types(weights.dtype, torch.float32)).square_()
        if n % c or m % b:
            own = F.pad(own, (0, -n % c, 0, -m % b))
        return own.view(len(own), self.grid[0], b, self.grid[1], c).sum((2, 4), dtype=widest(own.device))

    def multiply_(self, weights: Tensor, values: Tensor, shard: FullShard) -> None:
        """Multiply what this process holds of each tile by one of ``values`` (M N)."""
        (m, n), (b, c) = self
        if shard.split or m % b or n % c:
            weights.mul_(self.each(values, shard))
        else:
            weights.view(self.grid[0], b, self.grid[1], c).mul_(values.view(self.grid[0], 1, self.grid[1], 1))

    def of_rows(self, values: Tensor, first: int, last: int) -> Tensor:
        """Those of ``values`` (M N) that belong to rows of whole tiles, or to rows of one."""
        b = self.tile[0]
        return values.view(self.grid)[first // b : -(-last // b)].reshape(-1)

    def bands(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The rows from ``first`` to ``last`` some at a time: whole rows of tiles, or parts of one."""
        parts = PARTS_OF_LARGE if is_large(self.shape) else PARTS
        b, most = self.tile[0], max(1, -(-(last - first) // parts))
        span = max(b, most // b * b)
        for band in range(first // b * b, last, span):
            begin, end = max(first, band), min(last, band + span)
            for part in range(begin, end, min(span, most)):
                yield part, min(end, part + min(span, most))

    def each(self, values: Tensor, shard: FullShard) -> Tensor:
        """One of ``values`` (M N) for each weight that this process holds, laid out as they are."""
        (_, n), (b, c) = self
        first, last, lead, tail = self._lines(shard)
        tiles = values.view(self.grid)[first // b : -(-last // b)]
        rows = tiles.repeat_interleave(b, 0)[first % b :][: last - first]
        flat = (rows.repeat_interleave(c, 1)[:, :n] if c > 1 else rows).reshape(-1)
        return flat[lead : len(flat) - tail].view(shard.parameter.shape)

    def _lines(self, shard: FullShard) -> tuple[int, int, int, int]:
        """The rows of which this process holds weights, and how many of these it does not hold, at both ends."""
        n, begin = self.shape[1], shard.runs.begin
        end = begin + shard.parameter.numel()
        first, last = begin // n, max(-(-end // n), begin // n)
        return first, last, begin - first * n, last * n - end


def _sides(whole: int, part: int, device: torch.device) -> Tensor:
    begins = torch.arange(0, whole, part, dtype=widest(device), device=device)
    return (whole - begins).clamp_(max=part)
