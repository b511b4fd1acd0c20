"""8-bit GaLore, and Q-GaLore: a packed projector, refreshed when its subspace moves.

Zhao et al. 2024, arXiv:2403.03507 (8-bit GaLore); Zhang et al. 2024, arXiv:2407.08296 (Q-GaLore). The loop of
``galore.py`` with three storage choices, the last two off by default:

    M, V             8-bit codes in blocks of 256, through bitsandbytes
    quant            P as 4- or 8-bit codes in groups of 256: what projects and lifts is the unpacked P^
    cos_threshold    each matrix has its own gap T_l, at first T:
                         at a refresh   o = |P_old^T P_new|^2 / r               in [0, 1], of noise r / k
                                        c = (o - r / k) / (1 - r / k)           of noise 0, at most 1
                         when the last 5 c average to at least the threshold    T_l <- gamma_proj * T_l

k is the side that P replaces. Of gradients that have nothing in common, o is r / k: Q-GaLore's threshold of 0.4 would
be passed by chance from r / k = 0.4 on. The new subspace must not come from the old one either: with ``iterate`` it is
found from a random start, and its basis turned to that of the old one, so that coordinates keep their meaning.

Weights are as they are given: Q-GaLore's in 8 bits are layers of ``gracile.models.int8``.

Departures from Q-GaLore's code: codes are packed, two 4-bit ones in a byte, and a group stores its minimum rather
than a clamped zero point, which cannot reach groups far from zero; a P in 4 bits is iterated for in fp64, so that
its codes do not depend on how processes share out the sums; c compares the whole subspace, not the signed
cosine of the first vectors, which is -1 for an unchanged subspace whose sign flipped, and is corrected for chance;
the next refresh comes T_l after the last one instead of whenever T_l divides t; the five c are forgotten after a
doubling, not counted twice. As in bitsandbytes, eps is added after the bias correction. Moments of fewer than 4096
elements stay fp32. Weights of groups without a rank decay after the step, as matrices do; bitsandbytes has it before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...fp64 import fp64_device
from ...validation import Check, flag, is_whole, number, require, whole
from ..core.clock import steps_of
from ..core.keywords import ACCEPTED, OF_8_BITS, Accepted
from ..core.rules import TORCH_ADAM
from ..core.rules_8bit import of_codes
from ..core.types import Group, ParamStep, State
from ..distributed import FullMatrix, FullShard, has_subspace
from ..state.blockwise_8bit import BLOCK, IN_8_BITS, require_bitsandbytes, scales_key
from ..state.packed_rows import BITS, packed, packed_specs, unpacked
from ..state.spec import PROJECTORS, Placement, StateSpec
from .basis import first_columns
from .galore import GaLore
from .published import Published
from .singular import Columns, orthogonal_iteration, orthonormalized, rounding_error

PACKED = ("basis", "basis_scale", "basis_minimum")


def _bits(key: str, value: object) -> None:
    require(is_whole(value) and value in BITS, f"{key} must be 4 or 8", value)


class GaLoreAdamW8bit(GaLore):
    """GaLore's AdamW with 8-bit moments; as options, Q-GaLore's packed projector and lazy refreshes (arXiv:2407.08296).

    A drop-in for ``galore_torch.GaLoreAdamW8bit``, whose defaults it has. Groups without a ``rank`` get 8-bit AdamW.

    Args:
        params, lr, betas, weight_decay, rank, update_proj_gap, scale, proj_type, subspace_method, shard_basis,
            refreshes_at_once: as for ``GaLoreAdamW``.
        eps: added after the bias correction, as in ``torch.optim.AdamW`` and bitsandbytes.
        quant: store P in ``quant_n_bit`` bits an element.
        quant_n_bit: 4 or 8.
        quant_group_size: how many elements of P share a scale and a minimum.
        cos_threshold: refresh a matrix ``gamma_proj`` times more rarely each time that the overlap of its last
            ``queue_size`` new subspaces with the ones before them (1: the same; 0: as near as chance) averages to this
            or more; None refreshes every ``update_proj_gap`` steps. Q-GaLore has 0.4.
        gamma_proj: factor on the number of steps between refreshes.
        queue_size: how many refreshes are averaged.
        torch_keywords: as for ``GaLoreAdamW``.

    State of an m x n matrix: 2 bytes for each of the r * long moments and 8 for each block of 256 of them; P in its
    dtype, or packed with 8 bytes for each group. Moments of fewer than 4096 elements stay in fp32.

    Raises:
        ImportError: at construction, without bitsandbytes.
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).

    Example:
        >>> from torch import nn
        >>> from gracile.optim import GaLoreAdamW8bit, param_groups
        >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> groups = param_groups(model, rank=16, target_modules="all-linear", quant=True, cos_threshold=0.4)
        >>> optimizer = GaLoreAdamW8bit(groups, lr=0.01)
        >>> model(torch.randn(16, 256)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["basis"].shape  # 64 x 16 elements, two in a byte
        torch.Size([4, 128])
        >>> GaLoreAdamW8bit.state_bytes_for((4096, 4096), rank=128, quant=True)  # GaLoreAdamW: 6291460
        1343492
    """

    rule = replace(TORCH_ADAM, decay_first=False)
    rule_of_codes = of_codes(rule)
    moment_codec = IN_8_BITS
    captures = True
    few_kernels = False
    only_read = PACKED
    published = Published("galore-torch", scratch=("unorm_vec",))
    accepted: ClassVar[Mapping[str, Accepted]] = {**ACCEPTED, **OF_8_BITS}
    checks: ClassVar[Mapping[str, Check]] = {
        "quant": flag(),
        "quant_n_bit": _bits,
        "quant_group_size": whole(2),
        "cos_threshold": number("in [0, 1]", optional=True),
        "gamma_proj": number(">= 1"),
        "queue_size": whole(1),
    }

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
        refreshes_at_once: int | None = None,
        **torch_keywords: object,
    ) -> None:
        require_bitsandbytes()
        super().__init__(params, locals())

    def stack_numbers(self, item: ParamStep) -> int:
        whole = scales_key("exp_avg") not in item.state or item.state["exp_avg"].numel() % BLOCK == 0
        return super().stack_numbers(item) if whole else 0  # no block of a stack reaches into the next matrix

    # ---- the packed projector -----------------------------------------------------------------------------------

    def basis_specs(self, shard: FullMatrix, group: Group) -> list[StateSpec]:
        specs = super().basis_specs(shard, group)
        if group["quant"]:
            size, (length, rank) = group["quant_group_size"], shard.side.basis_shape
            rows = -(-length * rank // size)
            specs = packed_specs("basis", rows, size, group["quant_n_bit"], Placement.BASIS, PROJECTORS)
        if group["cos_threshold"] is not None:
            gap, queue = group["update_proj_gap"], (group["queue_size"],)
            specs += [
                StateSpec("overlap", ()),
                StateSpec("next_refresh", (), torch.int64, on_host=True),
                StateSpec("refresh_gap", (), torch.int64, on_host=True, fill=gap),
                StateSpec("overlaps", queue, on_host=True, fill=torch.nan),
            ]
        return specs

    def initialize(self, shard: FullShard, group: Group, state: State) -> None:
        if has_subspace(shard):
            self._write_basis(first_columns(shard.side, shard.dtype, shard.device), None, shard, group, state)

    def columns(self, shard: FullMatrix, group: Group, state: State) -> Tensor:
        if not group["quant"]:
            return super().columns(shard, group, state)
        length, rank = shard.side.basis_shape
        size = group["quant_group_size"]
        held = {key: shard.all_gather_rows(state[key], -(-length * rank // size)) for key in PACKED}
        rows = unpacked("basis", held, size, group["quant_n_bit"])
        return rows.flatten(-2)[..., : length * rank].reshape(*rows.shape[:-2], length, rank).to(shard.dtype)

    def find_basis(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Columns:
        if group["cos_threshold"] is None or group["subspace_method"] == "svd":
            return super().find_basis(G, shard, group, state)
        seed = (shard.position + 1 << 32) + steps_of(state)
        sums = self.sums_of_subspace(shard, group)
        Q = orthogonal_iteration(shard.own(G), shard.side, None, shard.all_reduce_, seed, sums)
        P = self.previous_columns(shard, group, state)
        return Q if P is None else _turned_to(P, Q, sums)

    def sums_of_subspace(self, shard: FullMatrix, group: Group) -> torch.dtype:
        # a last bit moves a code of 4 bits by a fifteenth of all; with fp64 it is the same code in every layout
        coarse = group["quant"] and group["quant_n_bit"] == 4
        return torch.float64 if coarse else super().sums_of_subspace(shard, group)

    def store_basis(self, columns: Tensor, usable: Tensor, shard: FullMatrix, group: Group, state: State) -> None:
        if group["cos_threshold"] is not None:
            rotation = self.columns(shard, group, state).t().float() @ columns.float()  # r x r
            length, rank = shard.side.basis_shape
            by_chance = rank / length if rank < length else 0  # all of the space is always itself
            state["overlap"].copy_((rotation.square().sum() / rank - by_chance) / (1 - by_chance))
        self._write_basis(columns, usable, shard, group, state)

    def stores_stacks(self, group: Group) -> bool:
        return not group["quant"] and group["cos_threshold"] is None

    def _write_basis(
        self, columns: Tensor, usable: Tensor | None, shard: FullMatrix, group: Group, state: State
    ) -> None:
        """Columns into ``state`` as it keeps them, where ``usable``, if that is a question."""
        fresh = {"basis": columns}
        if group["quant"]:
            fresh = packed("basis", _in_groups(columns, group["quant_group_size"]), group["quant_n_bit"])
        for key, value in fresh.items():
            own = shard.shard_rows(value)
            state[key].copy_(own if usable is None else torch.where(usable, own, state[key]))

    # ---- the lazy clock -----------------------------------------------------------------------------------------

    def due_in(self, shard: FullShard, group: Group, state: State) -> int:
        if group["cos_threshold"] is None:
            return super().due_in(shard, group, state)
        return max(0, int(state["next_refresh"].item()) - steps_of(state))

    def after_refresh(self, work: list[ParamStep]) -> None:
        lazy = [item for item in work if item.group["cos_threshold"] is not None]
        if not lazy:
            return
        device = lazy[0].state["overlap"].device
        overlaps = torch.stack([item.state["overlap"].to(device) for item in lazy]).cpu()  # one read for all
        for item, overlap in zip(lazy, overlaps, strict=True):
            # what was found from zeros says nothing: exact vectors of zeros are always the same
            waited = self.waited_for_gradient(item.shard)
            _set_next_refresh(overlap.new_tensor(torch.nan) if waited else overlap, item.group, item.state)
            if item.group["refreshes_at_once"] is not None:
                self._wait_for_turn(item)

    def _wait_for_turn(self, item: ParamStep) -> None:
        """The next refresh at the last turn of the matrix before it, or at the first after this step."""
        due, gap, turn = item.state["next_refresh"], item.group["update_proj_gap"], self.turn_of(item.shard, item.group)
        due.sub_((due - turn) % gap)
        if due < steps_of(item.state):
            due.add_(gap)


def _set_next_refresh(overlap: Tensor, group: Group, state: State) -> None:
    """T_l and the next refresh of a matrix that was refreshed in this step, whose ``overlap`` with its last subspace is
    known now; NaN where there is none to speak of."""
    queue, gap = state["overlaps"], state["refresh_gap"]
    refreshed_at = steps_of(state) - 1
    if refreshed_at > 0 and overlap.isfinite():
        queue.copy_(torch.cat([queue[1:], overlap.view(1)]))
    if queue.mean() >= group["cos_threshold"]:  # NaN, so false, until the queue is full
        gap.copy_((gap * group["gamma_proj"]).long())
        queue.fill_(torch.nan)
    state["next_refresh"].copy_(refreshed_at + gap)


def _turned_to(P: Tensor, Q: Tensor, sums: torch.dtype) -> Tensor:
    """The basis of the span of Q that comes from projecting P onto it."""
    at = fp64_device(Q.device) if sums == torch.float64 else Q.device
    wide = Q.to(at).to(torch.promote_types(Q.dtype, sums))
    previous = P.to(at).to(wide.dtype)
    turned = orthonormalized(wide @ (wide.t() @ previous), previous, rounding_error(Q.dtype))
    return turned.to(Q.dtype).to(Q.device)


def _in_groups(columns: Tensor, size: int) -> Tensor:
    """side x r columns as rows of ``size`` elements, the last row filled up with its last value."""
    flat = columns.reshape(-1)
    missing = -flat.numel() % size
    return torch.cat([flat, flat[-1:].expand(missing)]).view(-1, size)
