"""SST, sparse spectral training: AdamW on singular values and on sampled singular vectors.  Zhao et al. 2024,
arXiv:2405.15481.

For a layer W = U diag(sigma) V^T (m x n, k = min(m, n)), of whose pairs of vectors r are active:

    each step               sigma, U_A, V_A  <- Adam of their gradients          the layer gives those without sigma
                            sigma            <- max(sigma, 0)
                            each active column of U and V <- itself / its norm
    every swap_every steps  S  <- r of k pairs, drawn with p_i = (1 / k + sigma_i / sum sigma) / 2
                            U_A, V_A  <- the pairs of S                           W stays
                            their moments <- 0, and their learning rate rises from 0 in warmup_steps
    every round of these    U, sigma, V  <- SVD of W, before S is drawn           W stays
                            all moments <- 0

A round is ceil(k / r) draws, so that each pair has its turn; ``iterations`` is another number of them. The paper's
constants were not to be had: ``swap_every``, ``iterations`` and ``warmup_steps`` are our choices. Pairs are drawn when
a step ends, for gradients belong to the pairs that made them; the first ones are the largest. What is drawn is a
function of ``seed``, the layer and the step. Decay acts on sigma alone, for columns have length one. Gradients of sigma
and of vectors are of different size: clip them, if at all, by themselves.

Where processes hold replicas, or parts of a layer, one takes the SVD and the others take its bits: singular vectors are
not the same on two machines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...rng import generator_of
from ...validation import is_whole, require
from ..core.optimizer import Group, State
from ..core.rules import MOMENTS
from ..distributed import FullShard, ProcessGroup, sum_together_
from ..distributed.projection import LowRankUpdate
from .optimizer import FactoredOptimizer, LayerWork, Parts, at_step, since


class SSTAdamW(FactoredOptimizer):
    """AdamW for models with ``SpectralLinear`` layers, whose vectors it draws and decomposes anew (arXiv:2405.15481).

    Other parameters get plain AdamW.

    Args:
        params: parameters, named parameters or groups; U, V and sigma of a layer in one group.
        lr: learning rate.
        betas, eps: as for ``torch.optim.AdamW``.
        weight_decay: decoupled, before the step; not on U and V.
        swap_every: steps between draws of the active vectors.
        iterations: draws between singular value decompositions; None for ceil(k / r), each layer's own.
        warmup_steps: over which the learning rate of U and V rises after a draw.
        seed: of the draws.
        synchronize: where a process group has been started, replicas of a model (DistributedDataParallel) share the
            decompositions, and take each other's bits. False for a model that one process of them trains alone, which
            would wait for the others.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.

    State of an m x n layer: ``2 * (r * (m + n) + k)`` elements and three counters.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range, or where no
            parameter belongs to such a layer.
        UnsupportedLayout: at ``step``, where U, V and sigma of a layer are not stepped together.
    """

    needs = "SpectralLinear"
    stepped = ("U", "V", "sigma")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        swap_every: int = 200,
        iterations: int | None = None,
        warmup_steps: int = 20,
        seed: int = 0,
        synchronize: bool = True,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, locals())

    def validate(self, group: Group) -> None:
        every, rounds = group["swap_every"], group["iterations"]
        require(is_whole(every) and every >= 1, "swap_every must be a whole number >= 1", every)
        counted = rounds is None or (is_whole(rounds) and rounds >= 1)
        require(counted, "iterations must be a whole number >= 1 or None", rounds)
        for key in ("warmup_steps", "seed"):
            require(is_whole(group[key]) and group[key] >= 0, f"{key} must be a whole number >= 0", group[key])
        require(isinstance(group["synchronize"], bool), "synchronize must be True or False", group["synchronize"])

    def update(self, shard: FullShard, group: Group, state: State) -> None:
        vectors = self.part_of(shard) in ("U", "V")
        super().update(shard, {**group, "weight_decay": 0.0} if vectors else group, state)

    def plain_direction(self, shard: FullShard, group: Group, state: State) -> tuple[Tensor | LowRankUpdate, float]:
        name, t = self.part_of(shard), state["step"].item()
        if name is None:
            return super().plain_direction(shard, group, state)
        if name == "sigma":
            age = since(t, self._round(self._parts[shard.position].layer, group))
            return super().plain_direction(shard, group, at_step(state, age))
        age = since(t, group["swap_every"])
        N, correction = super().plain_direction(shard, group, at_step(state, age))
        rising = age < min(t, group["warmup_steps"])  # not at first: that is the schedule's business
        return N, correction * (age / group["warmup_steps"] if rising else 1.0)

    def _round(self, layer: Any, group: Group) -> int:
        """Steps between singular value decompositions of a layer."""
        pairs = min(layer.in_features, layer.out_features)
        iterations: int = group["iterations"] or -(-pairs // layer.rank)
        return iterations * int(group["swap_every"])

    # ---- layers, when all of each has moved -------------------------------------------------------------------------

    def settle_layers(self, layers: list[LayerWork]) -> None:
        self._renormalize(layers)
        due = [layer for layer in layers if layer.steps % layer.group["swap_every"] == 0]
        over = [layer for layer in due if self._is_over(layer)]
        for layer in due:
            if not self._is_over(layer):
                with layer.whole() as parts:
                    self._draw(layer, parts)
        if over:
            world = _world_of(over[0])
            for begin in range(0, len(over), world.size):
                self._decompose(over[begin : begin + world.size], world)

    def _renormalize(self, layers: list[LayerWork]) -> None:
        columns = [layer.stepped[name].shard for layer in layers for name in ("U", "V")]
        squares = [shard.column_squares() for shard in columns]
        sum_together_(list(zip(columns, squares, strict=True)))
        for shard, square in zip(columns, squares, strict=True):
            shard.divide_columns(square.sqrt_().clamp_(min=1e-12))
        for layer in layers:
            layer.stepped["sigma"].shard.parameter.clamp_(min=0)

    def _decompose(self, layers: list[LayerWork], world: ProcessGroup) -> None:
        """Layers decomposed, each by one process: none holds more of them whole than its own and one at a time."""
        found = [layer.whole_at(owner) for owner, layer in enumerate(layers)]
        if world.rank < len(layers):
            layers[world.rank].layer.refactor(found[world.rank])
        for owner, layer in enumerate(layers):
            with layer.whole_from(owner, found[owner], world) as parts:
                self._draw(layer, parts)

    def _draw(self, layer: LayerWork, parts: Parts) -> None:
        """Other active vectors."""
        generator = generator_of(layer.group["seed"], "SST", layer.position, layer.steps)
        likely = layer.layer.probabilities(parts).cpu()
        order = layer.layer.swap(torch.multinomial(likely, layer.layer.rank, generator=generator), parts)
        self._restart(layer, order)

    def _is_over(self, layer: LayerWork) -> bool:
        return layer.steps % self._round(layer.layer, layer.group) == 0

    def _restart(self, layer: LayerWork, order: Tensor) -> None:
        """Moments of vectors are nothing now; those of sigma follow their pairs, but for a new decomposition's."""
        for name, (shard, _, state) in layer.stepped.items():
            for key in MOMENTS:
                if name != "sigma" or self._is_over(layer):
                    state[key].zero_()
                else:
                    state[key].copy_(shard.part_of(shard.whole_of(state[key])[order]))


def _world_of(layer: LayerWork) -> ProcessGroup:
    """The processes that share what is found of a layer."""
    shard = layer.stepped["U"].shard
    return shard.world if shard.split or layer.group["synchronize"] else ProcessGroup.alone()
