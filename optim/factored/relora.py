"""ReLoRA: AdamW on low-rank factors that are folded into their weight again and again.  Lialin et al. 2023,
arXiv:2307.05695.

For a layer y = x W^T + s x A^T B^T with W (m x n) frozen:

    each step                A, B  <- Adam
    every merge_every steps  W     <- W + s B A,   A <- drawn anew,   B <- 0       the function stays
    every reset_every steps  moments of A and B <- 0, or all but a part of them

and a learning rate that falls to zero and rises again at each merge (``JaggedCosineLR``). Departures from the
authors' code: a reset to zero leaves nothing, theirs leaves a random thousandth, to please another optimizer; with
``reset_step`` the bias correction starts again too, without it the first updates after a reset are three times as
large as Adam's; merges and resets come when a step ends and not one later; moments are pruned to the exact count, and
both in the same places, for a first moment whose second is zero moves its weight by ten learning rates. A warm start,
some thousand steps of all weights, is a run of its own whose model the next one begins with.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...rng import generator_of
from ...validation import Check, flag, number, one_of, whole
from ..core.batches import Direction
from ..core.clock import since, steps_of, with_age
from ..core.optimizer import FIND
from ..core.rules import MOMENTS
from ..core.types import Group, ParamStep, State
from ..distributed import FullShard
from .optimizer import FactoredOptimizer, LayerStep

RESETS = ("zero", "random", "magnitude")


class ReLoRAAdamW(FactoredOptimizer):
    """AdamW for models with ``ReLoRALinear`` layers, whose factors it merges into their weights (arXiv:2307.05695).

    Other parameters, which stay of full rank, get plain AdamW. The learning rate's schedule is ``JaggedCosineLR``.

    Args:
        params: parameters, named parameters or groups; A and B of a layer in one group. Frozen ones need not be there.
        lr: learning rate; the authors take twice that of training all weights.
        betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        merge_every: steps between merges.
        reset_every: steps between resets of moments; None for ``merge_every``.
        reset: ``zero`` all of them; ``random`` or ``magnitude``: a part, at random or where the first moment is least.
        reset_ratio: that part, from 0 to 1.
        reset_step: count Adam's steps from the last reset.
        seed: of random resets.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n layer: ``2 * r * (m + n)`` elements and two counters.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range, or where no
            parameter belongs to such a layer.
        RuntimeError: at ``step``, for sparse gradients, or (UnsupportedLayout) where A and B of a layer are not stepped
            together.

    Example:
        >>> from torch import nn
        >>> from gracile.models.convert import convert
        >>> from gracile.models.layers import ReLoRALinear
        >>> from gracile.optim import ReLoRAAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> model = convert(model, ReLoRALinear, ["0"], rank=4)
        >>> optimizer = ReLoRAAdamW(param_groups(model), lr=0.01, merge_every=2)
        >>> for _ in range(2):
        ...     model(torch.randn(16, 64)).square().mean().backward()
        ...     optimizer.step()
        ...     print(int(model[0].folds), bool(model[0].B.any()))  # merges so far, and whether B is not zero
        0 True
        1 False
    """

    method = "relora"
    layer_class = "ReLoRALinear"
    stepped = ("A", "B")
    together = "A and B of a layer"
    checks: ClassVar[Mapping[str, Check]] = {
        "merge_every": whole(1),
        "reset_every": whole(1, optional=True),
        "reset": one_of(*RESETS),
        "reset_ratio": number("in [0, 1]"),
        "reset_step": flag(),
        "seed": whole(0),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        merge_every: int = 5000,
        reset_every: int | None = None,
        reset: str = "zero",
        reset_ratio: float = 0.9,
        reset_step: bool = True,
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def direction(self, G: Tensor, shard: FullShard, group: Group, state: State) -> Direction:
        if self.part_of(shard) is not None and group["reset_step"]:
            state = with_age(state, since(steps_of(state), _reset_every(group)))
        return super().direction(G, shard, group, state)

    def batch_kind(self, item: ParamStep) -> object:
        return self.part_of(item.shard) is not None  # which may have an age of its own

    def after_layers(self, layers: list[LayerStep]) -> None:
        for layer in layers:
            merges = layer.steps % layer.group["merge_every"] == 0
            resets = layer.steps % _reset_every(layer.group) == 0
            if not (merges or resets):
                continue
            with self.phase(FIND):
                if merges:
                    with layer.whole() as parts:
                        layer.layer.fold(parts)
                if resets:
                    self._reset(layer)

    def _reset(self, layer: LayerStep) -> None:
        for name, item in layer.stepped.items():
            shard, group, state = item.shard, item.group, item.state
            if group["reset"] == "zero":
                for key in MOMENTS:
                    state[key].zero_()
                continue
            whole = shard.gather_whole(state["exp_avg"])
            order = whole.abs().flatten()
            if group["reset"] == "random":
                generator = generator_of(group["seed"], "ReLoRA", layer.position, name, layer.steps)
                order = torch.rand(order.shape, generator=generator, device="cpu").to(whole.device)
            gone = torch.zeros_like(order, dtype=torch.bool)
            gone[_smallest(order, group["reset_ratio"])] = True
            for key in MOMENTS:
                state[key].masked_fill_(shard.part_of(gone.view(whole.shape)), 0)


def _reset_every(group: Group) -> int:
    return int(group["reset_every"] or group["merge_every"])


def _smallest(values: Tensor, ratio: float) -> Tensor:
    """Where the smallest of ``values`` (flat) are, ``ratio`` of them exactly; of equals the first."""
    return values.sort(stable=True).indices[: floor(ratio * len(values))]
