"""S2FT: some heads and some channels of the MLP are trained; Yang et al. 2024 (arXiv:2412.06289).

    of the channels of all MLPs together, in random order:    down[:, c] of the first down_ratio, up[c, :] of the first
                                                              up_ratio, gate[c, :] of the first gate_ratio
    of the heads of all blocks together, in random order:     o[:, heads] of the first o_ratio, v[heads, :] of the first
                                                              v_ratio

One order serves all sides of a channel: with equal ratios they are the same channels, else the fewer are among the
more. Blocks have different numbers of them.

Departures from the authors' code (Infini-AI-Lab/S2FT): nothing is permuted, for a mask of rows and columns says the
same, and biased and tied layers and rotary embeddings are no special cases; under grouped-query attention the unit is a
key-value head with all query heads that share it, where theirs permutes queries by the number of key-value heads and
the output by that of query heads; the matrix itself is trained, and not a delta beside the whole of it; gradients are
those of the whole matrix, which theirs saves in its efficient path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..optim.distributed import full_shape
from ..optim.sparse.selected import Columns, Rows, Selection
from ..rng import generator_of
from ..validation import Check, number, require, whole
from .blocks import Part, blocks_of
from .method import Groups, Method, masked_group, train_only

# What families call the matrices of a block.
NAMES = {
    "down": ("down_proj", "fc2"),
    "up": ("up_proj", "fc1"),
    "gate": ("gate_proj",),
    "o": ("o_proj", "out_proj"),
    "v": ("v_proj",),
}
SIDES = {"down": Columns, "up": Rows, "gate": Rows, "o": Columns, "v": Rows}
CHANNELS, HEADS = ("down", "up", "gate"), ("o", "v")


@dataclass(frozen=True)
class S2FT(Method):
    """Structured sparse fine-tuning: whole rows and columns, for ``SparseAdamW``.

    Args:
        down_ratio: the share of the channels of all MLPs whose columns of ``down_proj`` are trained.
        up_ratio, gate_ratio: the share of them whose rows of ``up_proj`` or ``gate_proj`` are.
        o_ratio: the share of all heads whose columns of ``o_proj`` are trained, in groups that share a key-value head.
        v_ratio: the share of all key-value heads whose rows of ``v_proj`` are.
        seed: of the choice.

    Raises:
        ValueError: for a value out of range, or no ratio above 0.

    Example:
        >>> from gracile.models import build_llama
        >>> from gracile.optim import SparseAdamW
        >>> from gracile.selections import S2FT
        >>> model = build_llama("2m", num_hidden_layers=2)
        >>> optimizer = SparseAdamW(S2FT(down_ratio=0.1, o_ratio=0.25).groups(model), lr=1e-4)
        >>> sum(p.requires_grad for p in model.parameters()) <= 4
        True
    """

    down_ratio: float = 0.02
    up_ratio: float = 0.0
    gate_ratio: float = 0.0
    o_ratio: float = 0.0
    v_ratio: float = 0.0
    seed: int = 0

    checks: ClassVar[Mapping[str, Check]] = {
        **{f"{side}_ratio": number("in [0, 1]") for side in SIDES},
        "seed": whole(0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        ratios = {f"{side}_ratio": self.ratio(side) for side in SIDES}
        require(any(ratios.values()), "one ratio at least must be above 0", ratios)

    def ratio(self, side: str) -> float:
        """The share of a side: ``down``, ``up``, ``gate``, ``o`` or ``v``."""
        share: float = getattr(self, f"{side}_ratio")
        return share

    def groups(self, model: nn.Module) -> Groups:
        """One group, of the matrices that have a row or column to train; everything else of ``model`` is frozen.

        Raises:
            ValueError: for a model without blocks or without a matrix of the name, heads that do not divide one, or a
                ratio that is less than one unit.
        """
        blocks = list(blocks_of(model).values())
        selected: dict[Tensor, Selection] = {}
        for sides, what in ((CHANNELS, "channels"), (HEADS, "heads")):
            wanted = [side for side in sides if self.ratio(side) > 0]
            if wanted:
                self._choose(model, blocks, wanted, what, selected)
        train_only(model, selected)
        return [masked_group(selected)]

    def _choose(
        self,
        model: nn.Module,
        blocks: Sequence[Sequence[Part]],
        wanted: Sequence[str],
        what: str,
        selected: dict[Tensor, Selection],
    ) -> None:
        """Put the rows or columns of the sides ``wanted``, which share their units, into ``selected``."""
        matrices = {side: [_matrix(parts, side) for parts in blocks] for side in wanted}
        for side, found in matrices.items():
            require(any(p is not None for p in found), f"{side}_ratio: no block has a layer called", NAMES[side])
        units = [self._units(model, [matrices[side][i] for side in wanted], wanted) for i in range(len(blocks))]
        ends = list(accumulate(units))
        order = torch.randperm(ends[-1], generator=generator_of("s2ft", self.seed, what))
        for side in wanted:
            count = round(self.ratio(side) * ends[-1])
            require(count > 0, f"{side}_ratio must be one of {ends[-1]} {what} at least", self.ratio(side))
            taken = order[:count].sort().values
            for p, begin, end in zip(matrices[side], [0, *ends], ends, strict=False):
                own = taken[(taken >= begin) & (taken < end)] - begin
                if p is not None and len(own):
                    width = full_shape(p)[_axis(side)] // (end - begin)
                    lines = (own[:, None] * width + torch.arange(width)).view(-1)
                    selected[p] = SIDES[side](tuple(lines.tolist()))

    def _units(self, model: nn.Module, matrices: Sequence[Tensor | None], sides: Sequence[str]) -> int:
        """How many channels, or heads of keys and values, a block has."""
        sizes = {side: full_shape(p)[_axis(side)] for side, p in zip(sides, matrices, strict=True) if p is not None}
        if not sizes:
            return 0
        if sides[0] in CHANNELS:
            require(len({*sizes.values()}) == 1, "the sides of a block's channels must be of one size", sizes)
            return next(iter(sizes.values()))
        heads = key_value_heads(model)
        for side, size in sizes.items():
            require(size % heads == 0, f"{heads} key-value heads must divide the {side}_proj of a block", size)
        return heads


def key_value_heads(model: nn.Module) -> int:
    """The number of heads of keys and values of each block, as the model's configuration says.

    Raises:
        ValueError: for a model that does not say.
    """
    config = getattr(model, "config", None)
    own = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    require(isinstance(own, int), "o_ratio and v_ratio need model.config.num_attention_heads, a whole number", own)
    assert isinstance(own, int)
    return own


def _axis(side: str) -> int:
    return 0 if SIDES[side] is Rows else 1


def _matrix(parts: Sequence[Part], side: str) -> Tensor | None:
    found = [part for part in parts if part.leaf in NAMES[side]]
    names = [part.name for part in found]
    require(len(found) < 2, f"{side}_ratio is for blocks with one {NAMES[side][0]}, as without experts", names)
    require(
        all(len(full_shape(part.weight)) == 2 for part in found), f"{side}_ratio is for matrices, no experts", names
    )
    return found[0].weight if found else None
