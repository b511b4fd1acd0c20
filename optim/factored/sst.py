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

A round is ceil(k / r) draws, so that each pair has its turn; ``iterations`` is another number of them. The defaults are
the paper's: 200 steps a draw, 20 of warm-up, k / r draws a round. The paper also resets the moments of sigma at each
draw (``reset_sigma``); ours follow their pairs, which made no difference where it was tried. Pairs are drawn when a
step ends, for gradients belong to the pairs that made them; the first ones are the largest. What is drawn is a
function of ``seed``, the layer and the step. Decay acts on sigma alone, for columns have length one. Gradients of sigma
and of vectors are of different size: clip them, if at all, by themselves.

Where processes hold replicas, or parts of a layer, one takes the SVD and the others take its bits: singular vectors are
not the same on two machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...rng import generator_of
from ...validation import Check, flag, whole
from ..core import batches
from ..core.batches import Direction, launches_cost
from ..core.clock import since, steps_of, with_age
from ..core.optimizer import FIND
from ..core.rules import MOMENTS
from ..core.types import Group, ParamStep, State
from ..distributed import FullShard, ProcessGroup, all_reduce_shares_, stacked
from .optimizer import FactoredOptimizer, LayerStep, Parts

VECTORS = ("U", "V")
SHORTEST = 1e-12  # a column's norm is taken for no less


class SSTAdamW(FactoredOptimizer):
    """AdamW for models with ``SpectralLinear`` layers: trains some singular vectors at a time (arXiv:2405.15481).

    Other parameters get plain AdamW.

    Args:
        params: parameters, named parameters or groups; U, V and sigma of a layer in one group.
        lr: learning rate.
        betas, eps: as for ``torch.optim.AdamW``.
        weight_decay: decoupled, before the step; not on U and V.
        swap_every: steps between draws of the active vectors.
        iterations: draws between singular value decompositions; None for ceil(k / r), each layer's own.
        warmup_steps: over which the learning rate of U and V rises after a draw.
        reset_sigma: whether the moments of sigma are reset at each draw too, as in the paper.
        seed: of the draws.
        synchronize: where a process group has been started, one replica of a model (DistributedDataParallel) computes
            a decomposition and the others copy it. False for a model that only one of the processes trains, which
            would wait for the others.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n layer: ``2 * (r * (m + n) + k)`` elements and three counters.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range, or where no
            parameter belongs to such a layer.
        RuntimeError: at ``step``, for sparse gradients, or (UnsupportedLayout) where U, V and sigma of a layer are not
            stepped together.

    Example:
        >>> from torch import nn
        >>> from gracile.models.convert import convert
        >>> from gracile.models.layers import SpectralLinear
        >>> from gracile.optim import SSTAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> model = convert(model, SpectralLinear, ["0"], rank=4)
        >>> optimizer = SSTAdamW(param_groups(model), lr=0.01)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> layer = model[0]
        >>> torch.allclose(layer.U.norm(dim=0), torch.ones(4)), bool((layer.sigma >= 0).all())  # after every step
        (True, True)
        >>> {name: tuple(optimizer.state[getattr(layer, name)]["exp_avg"].shape) for name in ("U", "V", "sigma")}
        {'U': (32, 4), 'V': (64, 4), 'sigma': (32,)}
    """

    method = "sst"
    layer_class = "SpectralLinear"
    stepped = ("U", "V", "sigma")
    together = "U, V and sigma of a layer"
    later_keys: ClassVar[Mapping[str, Any]] = {**FactoredOptimizer.later_keys, "reset_sigma": False}
    checks: ClassVar[Mapping[str, Check]] = {
        "swap_every": whole(1),
        "iterations": whole(1, optional=True),
        "warmup_steps": whole(0),
        "reset_sigma": flag(),
        "seed": whole(0),
        "synchronize": flag(),
    }

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
        reset_sigma: bool = False,
        seed: int = 0,
        synchronize: bool = True,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def move(self, work: list[ParamStep]) -> None:
        undecayed: dict[int, Group] = {}
        for item in work:
            if self.part_of(item.shard) in VECTORS:
                item.group = undecayed.setdefault(id(item.group), {**item.group, "weight_decay": 0.0})
        super().move(work)

    def direction(self, G: Tensor, shard: FullShard, group: Group, state: State) -> Direction:
        name, t = self.part_of(shard), steps_of(state)
        if name is None:
            return (yield from super().direction(G, shard, group, state))
        age = self._age(shard, group, t)
        N, correction = yield from super().direction(G, shard, group, with_age(state, age))
        rising = name in VECTORS and age < min(t, group["warmup_steps"])  # not at first: a schedule's business
        return N, correction * (age / group["warmup_steps"] if rising else 1.0)

    def batch_kind(self, item: ParamStep) -> object:
        name = self.part_of(item.shard)
        return None if name is None else (name in VECTORS, self._age(item.shard, item.group, steps_of(item.state)))

    def _age(self, shard: FullShard, group: Group, t: int) -> int:
        """Of the moments of a layer's part."""
        if self.part_of(shard) in VECTORS or group["reset_sigma"]:
            return since(t, group["swap_every"])
        return since(t, self._round(self._parts[shard.position].layer, group))

    def _round(self, layer: Any, group: Group) -> int:
        """Steps between singular value decompositions of a layer."""
        pairs = min(layer.in_features, layer.out_features)
        iterations: int = group["iterations"] or -(-pairs // layer.rank)
        return iterations * int(group["swap_every"])

    # ---- layers, when all of each has moved -------------------------------------------------------------------------

    def after_layers(self, layers: list[LayerStep]) -> None:
        self._renormalize(layers)
        due = [layer for layer in layers if layer.steps % layer.group["swap_every"] == 0]
        if due:
            with self.phase(FIND):
                self._new_vectors(due)

    def _new_vectors(self, due: list[LayerStep]) -> None:
        over = [layer for layer in due if self._is_over(layer)]
        for layer in due:
            if not self._is_over(layer):
                with layer.whole() as parts:
                    self._draw(layer, parts)
        if over:
            processes = _processes_of(over[0])
            for begin in range(0, len(over), processes.size):
                self._decompose(over[begin : begin + processes.size], processes)

    def _renormalize(self, layers: list[LayerStep]) -> None:
        torch._foreach_clamp_min_([layer.stepped["sigma"].shard.parameter for layer in layers], 0)
        columns = [layer.stepped[name].shard for layer in layers for name in VECTORS]
        if launches_cost(columns[0].device) and not any(shard.split for shard in columns):
            _normalize_together([shard.parameter for shard in columns])
            return
        squares = [shard.column_squares() for shard in columns]
        all_reduce_shares_(list(zip(columns, squares, strict=True)))
        for shard, square in zip(columns, squares, strict=True):
            shard.divide_columns(square.sqrt_().clamp_(min=SHORTEST))

    def _decompose(self, layers: list[LayerStep], processes: ProcessGroup) -> None:
        """Layers decomposed, each by one process: none holds more of them whole than its own and one at a time."""
        found = [layer.whole_at(owner) for owner, layer in enumerate(layers)]
        if processes.index < len(layers):
            layers[processes.index].layer.refactor(found[processes.index])
        for owner, layer in enumerate(layers):
            with layer.whole_from(owner, found[owner], processes) as parts:
                self._draw(layer, parts)

    def _draw(self, layer: LayerStep, parts: Parts) -> None:
        """Other active vectors."""
        generator = generator_of(layer.group["seed"], "SST", layer.position, layer.steps)
        likely = layer.layer.probabilities(parts).cpu()
        order = layer.layer.swap(torch.multinomial(likely, layer.layer.rank, generator=generator), parts)
        self._restart(layer, order)

    def _is_over(self, layer: LayerStep) -> bool:
        return layer.steps % self._round(layer.layer, layer.group) == 0

    def _restart(self, layer: LayerStep, order: Tensor) -> None:
        """Moments of vectors are nothing now; those of sigma follow their pairs, but for a new decomposition's, and
        where they are reset too."""
        reset = ("U", "V", "sigma") if self._is_over(layer) or layer.group["reset_sigma"] else ("U", "V")
        for name, item in layer.stepped.items():
            shard, state = item.shard, item.state
            for key in MOMENTS:
                if name in reset:
                    state[key].zero_()
                else:
                    state[key].copy_(shard.part_of(shard.gather_whole(state[key])[order]))


def _normalize_together(weights: list[Tensor]) -> None:
    """Each column of each weight divided by its norm: of alike weights by the same kernels."""
    alike: dict[object, list[Tensor]] = {}
    for W in weights:
        alike.setdefault((W.shape, W.dtype, W.device), []).append(W)
    for together in alike.values():
        at_once = max(1, batches.AT_ONCE // (3 * together[0].numel()))
        for begin in range(0, len(together), at_once):
            part = together[begin : begin + at_once]
            W, _ = stacked(part)
            squares = W.to(torch.promote_types(W.dtype, torch.float32)).square().sum(-2, keepdim=True)
            torch._foreach_copy_(part, list(W / squares.sqrt_().clamp_(min=SHORTEST)))


def _processes_of(layer: LayerStep) -> ProcessGroup:
    """The processes that share what is found of a layer."""
    shard = layer.stepped["U"].shard
    return shard.processes if shard.split or layer.group["synchronize"] else ProcessGroup.alone()
