"""APOLLO: the raw gradient, scaled by what Adam would do in a tiny random subspace.  Zhu et al. 2024, arXiv:2412.05270.

For a matrix W (m x n) with gradient G, the picture for m >= n (``right``; transpose it for ``left``):

    every T steps    P  <-  normal numbers of variance 1/r from a seed        n x r    subspace
                     R   =  G P                                               m x r    project
                     N   =  Adam(R), without its bias correction              m x r    rule, moments kept
    channel          s_j =  |N_j| / (|R_j| + 1e-8)                  for each of the m rows j
    tensor           s   =  |N| / (|R| + 1e-8)                                1 number  (APOLLO-Mini, with r = 1)
                     Z   =  s * G                                             m x n    residual: all of it, scaled
                     Z  <-  Z / max(|Z| / |Z_previous|, 1.01) * 1.01                   residual: growth limiter
                     W  <-  W - lr * sqrt(1 - b2^t) / (1 - b1^t) * sqrt(scale) * Z
                     W  <-  W - lr * decay * W

This is the arithmetic of the authors' ``apollo-torch``: the SQUARE ROOT of ``scale`` multiplies, before the limiter
where ``scale_front`` asks for it, and the limiter compares norms without bias correction.

Departures: P is not kept but drawn again from its seed at each step, in fp32 also for bf16 gradients (the paper counts
its memory so; the authors' code keeps P in the gradient's dtype); the norms run along the projected axis by the side,
not by comparing lengths; a rank above the short side is capped there; a vanishing norm is not stored as the one to
grow from; the host reads no norm. A GPU and a CPU draw different numbers from one seed: a run that moves between them
changes its subspace, as a refresh does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import Check, flag, is_whole, number, one_of, require
from ..core.batches import Direction
from ..core.clock import steps_of
from ..core.types import Group, ParamStep, State
from ..distributed import Block, BlockedUpdate, FullMatrix
from ..state.spec import StateSpec, wide_dtype
from .gaussian import following, gaussian_stack
from .growth_limiter import limit_growth_, limited_in_blocks
from .optimizer import LowRankOptimizer
from .published import Published
from .singular import Columns, leading_singular_vectors

PROJECTIONS = ("random", "svd")
SCALE_TYPES = ("channel", "tensor")
GROWTH = 1.01


def _seed(key: str, value: Any) -> None:
    fits = is_whole(value) and 0 <= value < 2**62
    require(fits, f"{key} must be a whole number from 0 to 2**62", value)


class APOLLOAdamW(LowRankOptimizer):
    """The whole gradient, scaled as Adam would scale it in a small random subspace (arXiv:2412.05270).

    Memory is close to that of SGD. APOLLO-Mini is ``rank=1, scale_type="tensor", scale=128``. A drop-in for
    ``apollo_torch.APOLLOAdamW``: groups with a ``rank`` are scaled, the others get plain AdamW.

    Args:
        params, betas, eps, weight_decay, update_proj_gap, proj_type, state_dtype: as for ``GaLoreAdamW``.
        lr: learning rate; a matrix with a rank moves by ``lr * sqrt(scale)``.
        scale: its square root multiplies the update of a matrix.
        rank: r, the dimension of the subspace; None gives a group plain AdamW. Capped at min(m, n).
        proj: ``random``, or ``svd`` for GaLore's subspace, which is kept as state.
        shard_basis: as for ``GaLoreAdamW``; a random projection is drawn again at each step and not stored.
        scale_type: a factor for each ``channel`` (a row, or a column of a wide matrix) or one for the whole ``tensor``.
        scale_front: multiply by the root of ``scale`` before the growth limiter instead of after.
        disable_nl: turn off the limiter on the growth of the update's norm.
        seed: the parameter at position i of all starts from seed + i.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: ``2 * r * long`` numbers, a seed, a norm and a counter; with ``proj="svd"`` also P.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import APOLLOAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> mini = {"rank": 1, "scale_type": "tensor", "scale": 128}  # APOLLO-Mini
        >>> optimizer = APOLLOAdamW(param_groups(model, target_modules="all-linear", **mini), lr=0.01)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> tuple(optimizer.state[model[0].weight]["exp_avg"].shape)
        (1, 64)
        >>> APOLLOAdamW.state_bytes_for((4096, 4096), **mini), APOLLOAdamW.state_bytes_for((4096, 4096))
        (32784, 134217732)
    """

    checks: ClassVar[Mapping[str, Check]] = {
        "scale": number(">= 0"),
        "proj": one_of(*PROJECTIONS),
        "scale_type": one_of(*SCALE_TYPES),
        "scale_front": flag(),
        "disable_nl": flag(),
        "seed": _seed,
    }

    captures = True
    stack_copies = 1
    only_read = ("basis", "seed")
    published = Published("apollo-torch", renamed={"update_norm": "scaled_grad"}, derived=("seed",))

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        scale_front: bool = False,
        disable_nl: bool = False,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: str = "std",
        proj: str = "random",
        scale_type: str = "channel",
        seed: int = 1,
        shard_basis: bool | None = None,
        state_dtype: torch.dtype | None = None,
        **torch_keywords: object,
    ) -> None:
        super().__init__(params, locals())

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["rank"] == 1 and group["scale_type"] == "channel":
            advice = "rank=1 with scale_type='channel' is known to train badly; APOLLO-Mini is scale_type='tensor'"
            warnings.warn(advice, stacklevel=4)

    def why_not_captured(self, group: Group) -> str | None:
        if group["rank"] is not None and group["proj"] == "random":
            return 'a random projection is drawn anew in every step; with proj="svd" it can be True'
        return super().why_not_captured(group)

    def basis_specs(self, shard: FullMatrix, group: Group) -> list[StateSpec]:
        norm = StateSpec("update_norm", (), wide_dtype(shard))
        if group["proj"] == "svd":
            return [norm, *super().basis_specs(shard, group)]
        return [norm, StateSpec("seed", (), torch.int64, on_host=True, fill=group["seed"] + shard.position)]

    def columns(self, shard: FullMatrix, group: Group, state: State) -> Tensor:
        if group["proj"] == "svd":
            return super().columns(shard, group, state)
        drawn = gaussian_stack(shard.side, state["seed"].view(-1).tolist(), shard.device)  # of the CPU
        return drawn if state["seed"].dim() else drawn[0]

    def waits_for_gradient(self, group: Group) -> bool:
        return bool(group["proj"] == "svd")

    def refresh(self, due: list[ParamStep]) -> None:
        solved = [item for item in due if item.group["proj"] == "svd"]
        if solved:
            super().refresh(solved)
        for item in due:
            if item.group["proj"] == "random" and steps_of(item.state) > 0:  # a seed is all there is
                item.state["seed"].fill_(following(int(item.state["seed"].item())))

    def find_basis(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Columns:
        previous = self.previous_columns(shard, group, state)
        return shard.solve(G, partial(leading_singular_vectors, side=shard.side, previous=previous))

    def low_rank_direction(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Direction:
        P = self.basis(shard, group, state)
        R = P.project(G)
        N, correction = yield R, state
        if group["scale_type"] == "channel":
            s = P.line_norms(N) / (P.line_norms(R) + 1e-8)
        else:
            s = shard.norm(N) / (shard.norm(R) + 1e-8)
        if group["scale_front"]:
            s = s * math.sqrt(group["scale"])
        # |R_j| = 0 where |N_j| is not: a factor that fp16 cannot hold
        s = s.clamp(max=torch.finfo(G.dtype).max).to(G.dtype)
        if not group["scale_front"]:
            correction = correction * math.sqrt(group["scale"])
        if shard.in_blocks(twice=not group["disable_nl"]):
            return self._in_blocks(G, s, shard, group, state), correction
        Z = torch.mul(G, s, out=shard.spare(G))
        if not group["disable_nl"]:
            limit_growth_(Z, shard, state["update_norm"], GROWTH)
        return Z, correction

    def _in_blocks(self, G: Tensor, s: Tensor, shard: FullMatrix, group: Group, state: State) -> BlockedUpdate:
        """Z of a large matrix."""

        def scaled(block: Block) -> Tensor:
            return block.of(G) * block.of(s)

        if group["disable_nl"]:
            return BlockedUpdate(G.shape, scaled)
        return BlockedUpdate(G.shape, limited_in_blocks(scaled, shard, state["update_norm"], GROWTH))
