"""HFT: a random half of the matrices of each block is trained, another half in each round; Hui et al. 2024
(arXiv:2404.18466).

    of every block:   2 of q, k, v, o                                                     attention
                      2 of gate, up, down in a random half of the blocks, 1 in the others      MLP
                      half of its norms
    embeddings, the last norm and the output layer are trained; all else is frozen for this round
    chosen by (seed, round, block): the same on every process, another choice in each round

A frozen matrix has no gradient, no state and no decay, whatever the optimizer. Weights carry over from round to round.

What the paper leaves open: numbers of a category that a share does not divide go to random blocks, so that a model's
total is off by less than one matrix; biases go with their matrix. Layers that hold several matrices (fused q, k and v;
experts in one tensor) are refused: a half of them is no whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..optim.distributed import full_shape
from ..optim.groups import param_groups
from ..rng import generator_of
from ..validation import Check, number, whole
from .blocks import ATTENTION, FUSED, MLP, NORM, Part, blocks_of
from .method import Groups, Method, set_trained


@dataclass(frozen=True)
class HFT(Method):
    """Half fine-tuning: whole matrices, half of each block's. Its groups suit any optimizer.

    Args:
        share: of the matrices of each category, over all blocks; 1 is full fine-tuning.
        seed: of the choice.
        round: which round of several this is; each has a choice of its own.
        weight_decay: of matrices; norms and biases get 0. None leaves it to the optimizer.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> from gracile.models import build_llama
        >>> from gracile.selections import HFT
        >>> model = build_llama("2m", num_hidden_layers=2)
        >>> groups = HFT(seed=0, round=1).groups(model)
        >>> [sum(p.requires_grad for p in layer.self_attn.parameters()) for layer in model.model.layers]
        [2, 2]
    """

    masked: ClassVar[bool] = False
    share: float = 0.5
    seed: int = 0
    round: int = 0
    weight_decay: float | None = None

    checks: ClassVar[Mapping[str, Check]] = {
        "share": number("in (0, 1]"),
        "seed": whole(0),
        "round": whole(0),
        "weight_decay": number(">= 0", optional=True),
    }

    def groups(self, model: nn.Module) -> Groups:
        """Parameter groups of what this round trains. Sets ``requires_grad`` of all matrices and norms of the blocks,
        those that another round froze too; of others it leaves it as it is.

        Raises:
            ValueError: for a model without blocks, or with layers that hold several matrices.
        """
        blocks = blocks_of(model)
        for parts in blocks.values():
            _refuse_fused(parts)
        for kind in (ATTENTION, MLP, NORM):
            of_kind = {block: [part for part in parts if part.kind == kind] for block, parts in blocks.items()}
            counts = self._counts(kind, {block: len(parts) for block, parts in of_kind.items()})
            for block, parts in of_kind.items():
                order = torch.randperm(len(parts), generator=generator_of("hft", self.seed, self.round, block, kind))
                trained = set(order[: counts[block]].tolist())
                for i, part in enumerate(parts):
                    for p in part.parameters:
                        set_trained(p, i in trained)
        return param_groups(model, weight_decay=self.weight_decay)

    def _counts(self, kind: str, sizes: Mapping[str, int]) -> dict[str, int]:
        """How many of each block are trained: its share rounded down, and one more in random blocks."""
        counts = {block: math.floor(self.share * size) for block, size in sizes.items()}
        missing = round(self.share * sum(sizes.values())) - sum(counts.values())
        names = list(sizes)
        order = torch.randperm(len(names), generator=generator_of("hft", self.seed, self.round, kind)).tolist()
        uneven = [names[i] for i in order if counts[names[i]] < self.share * sizes[names[i]]]
        for block in uneven[:missing]:
            counts[block] += 1
        return counts


def _refuse_fused(parts: list[Part]) -> None:
    for part in parts:
        if part.leaf in FUSED or (len(full_shape(part.weight)) > 2 and part.kind != NORM):
            raise ValueError(
                f"hft trains whole matrices, and {part.name} holds several; choose sara, which trains entries"
            )
