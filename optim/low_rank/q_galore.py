"""8-bit GaLore, and Q-GaLore: a packed projector, refreshed when its subspace moves.

Zhao et al. 2024, arXiv:2403.03507 (8-bit GaLore); Zhang et al. 2024, arXiv:2407.08296 (Q-GaLore). The loop of
``galore.py`` with three storage choices, the last two off by default:

    M, V             8-bit codes in blocks of 256, through bitsandbytes
    quant            P as 4- or 8-bit codes in groups of 256: what projects and lifts is the unpacked P^
    cos_threshold    each matrix has its own gap T_l, at first T:
                         at a refresh   c = |P_old^T P_new|^2 / r               in [0, 1]
                         when the last 5 c average to at least the threshold    T_l <- gamma_proj * T_l

Weights stay in the parameter's dtype: Q-GaLore's int8 weights are a layer, not an optimizer.

Departures from Q-GaLore's code: codes are packed, two 4-bit ones in a byte, and a group stores its minimum rather
than a clamped zero point, which cannot reach groups far from zero; c compares the whole subspace, not the signed
cosine of the first vectors, which is -1 for an unchanged subspace whose sign flipped; the next refresh comes T_l after
the last one instead of whenever T_l divides t; the five c are forgotten after a doubling, not counted twice. As in
bitsandbytes, eps is added after the bias correction. Moments of fewer than 4096 elements stay fp32. Weights of groups
without a rank decay after the step, as matrices do; bitsandbytes has it before.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import is_real, is_whole, require
from ..core.moments_8bit import EightBitMoments
from ..core.optimizer import Group, NewState, ParamStep, State
from ..core.rules import Rule, adam, adam_state, check_adam
from ..distributed import FullMatrix
from ..distributed.projection import first_columns
from ..state.blockwise_8bit import require_bitsandbytes
from ..state.packed_rows import BITS, packed, packed_state, unpacked
from .galore import GaLore

PACKED = ("basis", "basis_scale", "basis_minimum")


class GaLoreAdamW8bit(EightBitMoments, GaLore):
    """GaLore's AdamW with 8-bit moments; as options, Q-GaLore's packed projector and lazy refreshes.

    A drop-in for ``galore_torch.GaLoreAdamW8bit``, whose defaults it has. Groups without a ``rank`` get 8-bit AdamW.

    Args:
        params, lr, betas, eps, weight_decay, rank, update_proj_gap, scale, proj_type, subspace_method,
            shard_basis: as for ``GaLoreAdamW``.
        quant: hold P in ``quant_n_bit`` bits (4 or 8), in groups of ``quant_group_size`` elements.
        cos_threshold: refresh a matrix ``gamma_proj`` times more rarely each time that the overlap of its last
            ``queue_size`` new subspaces with their predecessors averages to this; None refreshes every
            ``update_proj_gap`` steps. Q-GaLore has 0.4.

    State of an m x n matrix: 2 bytes for each of the r * long moments and 8 for each block of 256 of them; P in its
    dtype, or packed with 8 bytes for each group.

    Raises:
        ImportError: at construction, without bitsandbytes.
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).
    """

    rule = Rule(check_adam, adam_state, partial(adam, torch_eps=True))
    host_state = GaLore.host_state | {"next_refresh", "refresh_gap", "overlaps"}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        subspace_method: str = "iterate",
        shard_basis: bool | None = None,
        quant: bool = False,
        quant_n_bit: int = 4,
        quant_group_size: int = 256,
        cos_threshold: float | None = None,
        gamma_proj: float = 2,
        queue_size: int = 5,
    ) -> None:
        require_bitsandbytes()
        super().__init__(params, locals())

    def validate(self, group: Group) -> None:
        require(isinstance(group["quant"], bool), "quant must be True or False", group["quant"])
        bits, size = group["quant_n_bit"], group["quant_group_size"]
        require(is_whole(bits) and bits in BITS, "quant_n_bit must be 4 or 8", bits)
        require(is_whole(size) and size >= 2, "quant_group_size must be a whole number >= 2", size)
        threshold, gamma = group["cos_threshold"], group["gamma_proj"]
        within = threshold is None or (is_real(threshold) and 0 <= threshold <= 1)
        require(within, "cos_threshold must be a number in [0, 1] or None", threshold)
        require(is_real(gamma) and gamma >= 1, "gamma_proj must be a number >= 1", gamma)
        queue = group["queue_size"]
        require(is_whole(queue) and queue >= 1, "queue_size must be a whole number >= 1", queue)

    # ---- the packed projector -----------------------------------------------------------------------------------

    def basis_state(self, shard: FullMatrix, group: Group) -> NewState:
        state, device = super().basis_state(shard, group), shard.parameter.device
        if group["quant"]:
            size, bits = group["quant_group_size"], group["quant_n_bit"]
            columns = first_columns(shard.frame, shard.parameter.dtype, device)
            groups = -(-columns.numel() // size)
            first = _in_groups(columns, size)
            state = packed_state("basis", groups, size, bits, device) if first.is_meta else packed("basis", first, bits)
            state = {key: shard.kept(value) for key, value in state.items()}
        if group["cos_threshold"] is not None:
            state["overlap"] = torch.zeros((), dtype=torch.float32, device=device)
            state["next_refresh"] = torch.zeros((), dtype=torch.int64, device=shard.host)
            state["refresh_gap"] = torch.full((), group["update_proj_gap"], dtype=torch.int64, device=shard.host)
            state["overlaps"] = torch.full((group["queue_size"],), torch.nan, device=shard.host)
        return state

    def columns(self, shard: FullMatrix, group: Group, state: State) -> Tensor:
        if not group["quant"]:
            return super().columns(shard, group, state)
        side, rank = shard.frame.basis_shape
        size = group["quant_group_size"]
        held = {key: shard.collected(state[key], -(-side * rank // size)) for key in PACKED}
        rows = unpacked("basis", held, size, group["quant_n_bit"])
        return rows.flatten()[: side * rank].view(side, rank).to(shard.parameter.dtype)

    def store_basis(self, columns: Tensor, usable: Tensor, shard: FullMatrix, group: Group, state: State) -> None:
        if group["cos_threshold"] is not None:
            rotation = self.columns(shard, group, state).t().float() @ columns.float()  # r x r
            state["overlap"].copy_(rotation.square().sum() / shard.frame.rank)
        if not group["quant"]:
            super().store_basis(columns, usable, shard, group, state)
            return
        fresh = packed("basis", _in_groups(columns, group["quant_group_size"]), group["quant_n_bit"])
        for key, value in fresh.items():
            state[key].copy_(torch.where(usable, shard.kept(value), state[key]))

    # ---- the lazy clock -----------------------------------------------------------------------------------------

    def refresh_is_due(self, group: Group, state: State) -> bool:
        if group["cos_threshold"] is None:
            return super().refresh_is_due(group, state)
        return bool(state["step"].item() >= state["next_refresh"].item())

    def refreshed(self, work: list[ParamStep]) -> None:
        lazy = [(group, state) for _, group, state in work if group["cos_threshold"] is not None]
        if not lazy:
            return
        told = torch.stack([state["overlap"].to(lazy[0][1]["overlap"].device) for _, state in lazy]).cpu()  # one read
        for (group, state), overlap in zip(lazy, told, strict=True):
            queue, gap = state["overlaps"], state["refresh_gap"]
            if state["step"].item() > 0 and overlap.isfinite():
                queue.copy_(torch.cat([queue[1:], overlap.view(1)]))
            if queue.mean() >= group["cos_threshold"]:  # NaN, so false, until the queue is full
                gap.copy_((gap * group["gamma_proj"]).long())
                queue.fill_(torch.nan)
            state["next_refresh"].copy_(state["step"].long() + gap)


def _in_groups(columns: Tensor, size: int) -> Tensor:
    """side x r columns as rows of ``size`` elements, the last row filled up with its last value."""
    flat = columns.reshape(-1)
    missing = -flat.numel() % size
    return torch.cat([flat, flat[-1:].expand(missing)]).view(-1, size)
