"""Optimizers of matrices in which n of every m consecutive weights of a row shall stay: their groups, and their masks.

Where an engine cuts a matrix, it may cut between the weights of a group of m. Such a group is completed from its parts,
a few numbers for each process, in one message for all matrices of a step; the rest of a mask is each process's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...nm_pattern import check_pattern, largest, largest_sizes
from ...validation import Check, flag
from ..core.optimizer import FIND
from ..core.rules import TORCH_ADAM
from ..core.types import Group, ParamStep
from ..distributed import FlatShard, FullShard, PieceOfFull, RowView, UnsupportedLayout, complete_rows
from .experts import EXPERTS, are_transposed, as_matrix, check_transposed, experts_of
from .lots import MovedInLots

MATRICES = (2, EXPERTS)  # dimensions of a matrix, and of those of a layer's experts
AT_ONCE = 8  # the largest m of which all pairs are compared together: they are m bytes a weight


class NMOptimizer(MovedInLots):
    """AdamW, as torch has it, but for the matrices of groups with an ``n``, which are the method's business."""

    rule = TORCH_ADAM
    matrix_key = "n"
    checks: ClassVar[Mapping[str, Check]] = {"transposed_experts": flag()}
    later_keys: ClassVar[Mapping[str, Any]] = {**MovedInLots.later_keys, "transposed_experts": False}

    def check_group(self, group: Group) -> None:
        if group["n"] is not None:
            check_pattern(group["n"], group["m"])

    def check_shape(self, shape: tuple[int, ...], group: Group) -> None:
        check_transposed(shape, group)
        if len(shape) not in MATRICES or as_matrix(shape, are_transposed(group))[1] % group["m"]:
            raise ValueError(
                f"n={group['n']} needs matrices with rows that m={group['m']} divides, got a parameter of shape "
                f"{shape}; put it into a group with n=None (gracile.optim.param_groups does)"
            )

    def needs_mask(self, item: ParamStep) -> bool:
        """Whether ``update`` will ask for the mask of a matrix: then its cut groups are completed before."""
        raise NotImplementedError

    def find(self, work: list[ParamStep]) -> None:
        due = [item for item in work if item.group["n"] is not None and self.needs_mask(item)]
        if due:
            with self.phase(FIND):
                self.complete_groups(due)

    def complete_groups(self, work: Iterable[ParamStep]) -> None:
        """Make ready for ``mask`` of these, as they are now. Collective."""
        work = [item for item in work if not are_transposed(item.group)]
        split = [item for item in work if isinstance(item.shard, FlatShard)]
        views = [RowView(item.shard.held, item.group["m"]) for item in split if isinstance(item.shard, FlatShard)]
        completed = complete_rows(views, [item.shard.parameter for item in split])
        positions = [item.shard.position for item in split]
        self._groups_of_m = dict(zip(positions, zip(views, completed, strict=True), strict=True))

    def mask(self, shard: FullShard, group: Group) -> Tensor:
        """Where the n largest of every m weights are (bool), laid out as this process holds the matrix."""
        if are_transposed(group):
            each = [own.shard.parameter for own in experts_of(shard, transposed=True)]
            masks = [largest(own, group["n"], group["m"]).t() for own in each]
            found = torch.stack(masks) if masks else torch.zeros_like(shard.parameter, dtype=torch.bool)
            return found.view(shard.parameter.shape)
        if isinstance(shard, FlatShard):
            view, completed = self._groups_of_m[shard.position]
            return view.flat(largest(view.rows(shard.parameter, completed), group["n"], group["m"]))
        if isinstance(shard, PieceOfFull):
            return largest_sizes(shard.parameter.detach().abs(), group["n"], group["m"])
        if shard.parameter.dim() not in MATRICES:
            raise UnsupportedLayout(f"a matrix came as a tensor of shape {tuple(shard.parameter.shape)}, without rows")
        return largest(shard.parameter, group["n"], group["m"])

    def fits_in_lots(self, item: ParamStep) -> bool:
        """Whether this process holds all of each group of m of which it holds some."""
        if are_transposed(item.group):
            return False
        if not isinstance(item.shard, FlatShard):
            return item.shard.parameter.dim() in MATRICES
        m = item.group["m"]
        return bool(item.shard.held.start % m == item.shard.held.stop % m == 0)

    def unit(self, group: Group) -> int:
        return int(group["m"])

    def mask_of_sizes(self, sizes: Tensor, group: Group) -> Tensor:
        """``mask`` of whole groups of m, one after the other, of which these are the |w| (flat)."""
        n, m = group["n"], group["m"]
        return largest_sizes(sizes, n, m, at_once=m <= AT_ONCE)
