"""Dynamic sparse training: AdamW on some weights of each matrix, and another choice of them now and then.

    before the first step     M  <-  K of the m n places of W;  W outside of M is zero             the mask
    every step                G  =   dL/dW, of all places                                           m x n
                              W[M] <- AdamW(G[M])                                                   K moments, twice
    every update_every steps, to t_end:
                              n     =  floor(drop_fraction(t) K)
                              keep  <-  the K - n weights of M that are worth most                  drop
                              grow  <-  n places outside of keep that promise most                  grow
                              M     <-  keep + grow;  what is new has weight and moments zero

The mask is a subspace of coordinates: a gather projects, a scatter lifts. Moments exist for its K weights alone. Only a
dense gradient is asked for, which a plain backward pass through a weight with zeros gives anyway; the model stays what
it is. Choices are exact in number and in whom they fall on, ties going to the lowest place, under ZeRO and FSDP2 as on
one process: optim/sparse/top_k.py.

Departures from published code (google-research/rigl, calgaryml/condensed-sparsity, sparse_learning):

- an update of the mask follows an ordinary step; there it takes the step's place, once in ``update_every``.
- only weights of the mask are ranked for dropping, so that none is kept that is not there; no noise breaks ties.
- counts are exact, drawn without replacement; Bernoulli masks drift.
- a cosine counts from ``t_begin`` on.
- gradients are ranked as ``step`` finds them: accumulated, averaged over processes, unscaled, clipped. A norm that
  clips them is that of all places.

Methods of this family are this class with some of the choices made: sets of keys in rigl.py, srigl.py and blast.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..core.optimizer import Group, NewState, ParamStep, ShardedOptimizer, State
from ..core.rules import MOMENTS, TORCH_ADAM
from ..distributed import FullShard, ProcessGroup, UnsupportedLayout, full_shape, held_shard
from .gather_scatter import Places
from .layer_budgets import BY_SHAPE, BY_WEIGHT, budgets_by_weight
from .mask_schedule import (
    STRUCTURES,
    as_matrix,
    check_masks,
    counts_after,
    density_at,
    density_of,
    drop_fraction_at,
    is_due,
    with_defaults,
)
from .masks import Change, Masked, Structure, nonzeros, weights_held

PACKED = ("indices", *MOMENTS)  # state that is as long as the mask
INT32 = 2**31 - 1


class SparseOptimizer(ShardedOptimizer):
    """The loop above. ``fixed`` holds what a method has chosen: keys that its groups do not have.

    State of an m x n matrix that keeps K weights: ``indices`` (K, int32), the ascending places of those that this
    process holds in its part, ``exp_avg`` and ``exp_avg_sq`` (K), a counter, and with ``grow="momentum"`` also
    ``momentum`` (m n). How many of K lie in a process's part changes with the mask.
    """

    rule = TORCH_ADAM
    fixed: ClassVar[Mapping[str, Any]] = {}
    _is_built = False
    _in_masks: frozenset[int] = frozenset()  # by position, matrices whose weights keep to their masks: not loaded since

    def __init__(self, params: ParamsT, arguments: Group) -> None:
        self._by_weight: dict[int, int] = {}  # weights left to a matrix, by position, until it has a mask
        super().__init__(params, arguments)
        for group in self.param_groups:
            self._mask_weights(group)
        self._is_built = True

    # ---- groups -------------------------------------------------------------------------------------------------

    def settings(self, group: Group) -> Group:
        """A group's keys and what the method has chosen."""
        return with_defaults({**self.fixed, **group})

    def structure(self, group: Group) -> Structure:
        return STRUCTURES[{**self.fixed, **group}["structure"]]

    def validate(self, group: Group) -> None:
        if any(keys[key] is not None for keys in (group, self.defaults) for key in ("sparsity", "density")):
            check_masks({**self.fixed, **group})

    def _check_parameters(self, group: Group) -> None:
        super()._check_parameters(group)
        density = density_of(group)
        if density is None:
            return
        entries = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        parameters = [p for p in entries if isinstance(p, Tensor)]  # what is not a tensor is torch's to refuse
        shapes = [full_shape(p) for p in parameters]
        for p, shape in zip(parameters, shapes, strict=True):
            if len(shape) < 2:
                raise ValueError(
                    f"sparsity={1 - density:g} needs matrices, got a parameter of shape {shape}; put it into a "
                    "group without a sparsity (gracile.optim.param_groups does)"
                )
            if not p.is_contiguous():
                raise ValueError(f"a parameter of shape {shape} is not contiguous; a mask counts its places in memory")
            if math.prod(shape) > INT32:
                raise ValueError(
                    f"places are 32-bit numbers; a parameter of shape {shape} has more than 2^31 - 1 of them"
                )
            self.structure(group).check_shape(as_matrix(shape), self.settings(group))
        if self.settings(group)["distribution"] in BY_SHAPE:
            for shape, units in zip(shapes, counts_after(None, shapes, self.settings(group)), strict=True):
                self.structure(group).check_budget(units, as_matrix(shape))

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        if self._is_built:
            self._mask_weights(self.param_groups[-1])

    # ---- how many -----------------------------------------------------------------------------------------------

    def counts_at(self, group: Group, step: int | None) -> dict[int, int]:
        """How many units of each of a group's matrices stay, by position among all parameters, also of those that are
        frozen now: to freeze one leaves the others what they have. Of ``BY_SHAPE``."""
        members = list(self._members[group["group_number"]].values())
        counts = counts_after(step, [member.shape for member in members], self.settings(group))
        return {member.position: count for member, count in zip(members, counts, strict=True)}

    # ---- state --------------------------------------------------------------------------------------------------

    def init_state(self, shard: FullShard, group: Group) -> NewState:
        """Empty masks: all matrices of a step are given theirs together. On the meta device, as many as will be."""
        if density_of(group) is None:
            return super().init_state(shard, group)
        count = self._planned_count(shard, group) if shard.host == "meta" else 0
        device, dtype = shard.parameter.device, shard.state_dtype(group)
        state = {"indices": torch.zeros(count, dtype=torch.int32, device=device)}
        state |= self.rule.state((count,), dtype, device, group)
        if self.settings(group)["grow"] == "momentum":
            state["momentum"] = torch.zeros(shard.parameter.numel(), dtype=dtype, device=device)
        return state

    def _planned_count(self, shard: FullShard, group: Group) -> int:
        """How many weights of a mask this process will hold: of a part of a matrix, its share of them."""
        keys, elements = self.settings(group), math.prod(shard.shape)
        units = round(density_at(0, keys) * self.structure(group).units(as_matrix(shard.shape), keys))
        if keys["distribution"] in BY_SHAPE:
            units = self.counts_at(group, 0).get(shard.position, units)
        if keys["structure"] == "constant_fan_in":
            units -= units % shard.shape[0]
        return round(self.structure(group).weights(units, keys) * shard.parameter.numel() / max(1, elements))

    def expected_state(self, parameter: Tensor, group: Group, saved: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        expected = super().expected_state(parameter, group, saved)
        held = saved.get("indices")
        if expected is None or "indices" not in expected or not isinstance(held, Tensor) or held.dim() != 1:
            return expected
        if len(held) and not 0 <= int(held.min()) <= int(held.max()) < parameter.numel():
            raise ValueError(f"the saved mask has places outside of a parameter of shape {tuple(parameter.shape)}")
        return {key: value.new_empty(len(held)) if key in PACKED else value for key, value in expected.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._in_masks = frozenset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._is_built = True  # of what is unpickled, torch keeps groups, state and defaults alone
        if not hasattr(self, "_by_weight"):
            self._by_weight = {}

    def spread_state(self, shard: FullShard, group: Group) -> NewState:
        if density_of(group) is None:
            return super().spread_state(shard, group)
        shape, device = tuple(shard.parameter.shape), shard.parameter.device
        by_place = (*MOMENTS, "momentum") if self.settings(group)["grow"] == "momentum" else MOMENTS
        state = {"step": torch.zeros((), dtype=torch.float32, device=shard.host)}
        state |= {"mask": torch.zeros(shape, dtype=torch.uint8, device=device)}
        return state | {key: torch.zeros(shape, dtype=shard.state_dtype(group), device=device) for key in by_place}

    def spread(self, shard: FullShard, group: Group, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Moments as a dense tensor has them, and a mask of ones and zeros: where weights lie changes with the layout,
        and how many a process has."""
        if "indices" not in state:
            return state
        shape, at = tuple(shard.parameter.shape), state["indices"].long()
        size, rest = math.prod(shape), {k: v for k, v in state.items() if k not in PACKED}
        found = {"mask": torch.zeros(size, dtype=torch.uint8, device=at.device).index_fill_(0, at, 1).view(shape)}
        for key in MOMENTS:
            found[key] = state[key].new_zeros(size).index_copy_(0, at, state[key]).view(shape)
        if "momentum" in rest:
            rest["momentum"] = rest["momentum"].view(shape)
        return rest | found

    def settled(self, shard: FullShard, group: Group, spread: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if "mask" not in spread:
            return spread
        self._in_masks = frozenset()
        at = spread["mask"].reshape(-1).nonzero().view(-1)
        moments = {key: spread[key].reshape(-1)[at] for key in MOMENTS}
        rest = {k: v.reshape(-1) if k == "momentum" else v for k, v in spread.items() if k != "mask"}
        return rest | moments | {"indices": at.int()}

    # ---- a step -------------------------------------------------------------------------------------------------

    def update(self, shard: FullShard, group: Group, state: State) -> None:
        if density_of(group) is None:
            super().update(shard, group, state)
            return
        W, G, M = shard.parameter.view(-1), shard.grad.reshape(-1), Places(shard, group, state["indices"])
        if "momentum" in state:
            state["momentum"].lerp_(G.to(state["momentum"].dtype), 1 - group["betas"][0])
        N, correction = self.rule.direction(M.of(G), state, group)
        if group["weight_decay"]:
            W.mul_(1 - group["lr"] * group["weight_decay"])  # of all places: faster than of some, and zeros stay
        M.add_(W, N, -group["lr"] * correction)

    def _refresh(self, work: list[ParamStep]) -> None:
        """First masks, for matrices that have none; weights outside of masks are zero from here on."""
        loose = list(self._masked([item for item in work if item.shard.position not in self._in_masks]))
        self._begin([matrix for matrix in loose if matrix.clock == 0])
        for matrix in loose:
            _keep_to_mask(matrix)
        if loose:
            self._in_masks |= {matrix.shard.position for matrix in loose}

    def _masked(self, work: Sequence[ParamStep]) -> Iterator[Masked]:
        for shard, group, state in work:
            if density_of(group) is not None:
                yield Masked(shard, self.settings(group), state)

    def settle(self, work: list[ParamStep]) -> None:
        """Masks change, of all matrices together that are due."""
        due = [
            item
            for item in work
            if density_of(item.group) is not None and is_due(item.state, {**self.fixed, **item.group})
        ]
        for lot in _alike(list(self._masked(due))):
            structure = STRUCTURES[lot[0].group["structure"]]
            held = weights_held(lot)
            budgeted = self._budgets(lot, held)
            keep, grow = [], []
            for matrix, weights, budget in zip(lot, held, budgeted, strict=True):
                units = weights // structure.weights(1, matrix.group)
                fraction = drop_fraction_at(matrix.clock, matrix.group)
                kept, grown = structure.amounts(units, budget, fraction)
                keep.append(kept)
                grow.append(grown)
            for matrix, change in zip(lot, structure.change(lot, budgeted, keep, grow), strict=True):
                _take(matrix, change)

    def _budgets(self, lot: Sequence[Masked], held: Sequence[int]) -> list[int]:
        """How many units each mask of a lot has after this step; where weights decide, as many as it has."""
        counts: dict[tuple[int, int], dict[int, int]] = {}  # by group and clock
        found = []
        for matrix, weights in zip(lot, held, strict=True):
            now, position = (matrix.group["group_number"], matrix.clock), matrix.shard.position
            if matrix.group["distribution"] in BY_WEIGHT:
                found.append(self._by_weight.get(position, weights) if matrix.clock == 0 else weights)
                continue
            if now not in counts:
                counts[now] = self.counts_at(matrix.group, matrix.clock)
            found.append(counts[now][position])
        return found

    def _begin(self, matrices: Sequence[Masked]) -> None:
        """Draw first masks into the state of matrices that have none."""
        for lot in _alike(matrices):
            structure = STRUCTURES[lot[0].group["structure"]]
            held = nonzeros(lot)
            budgeted = self._budgets(lot, held)
            for matrix, indices, count, weights in zip(
                lot, structure.begin(lot, budgeted, held), budgeted, held, strict=True
            ):
                own = structure.weights(count, matrix.group)
                matrix.state["indices"] = indices
                for key in MOMENTS:
                    if key in matrix.state:
                        matrix.state[key] = matrix.state[key].new_zeros(len(indices))
                if matrix.group["rescale_init"] and weights > own > 0:
                    matrix.weights.mul_(math.sqrt(math.prod(matrix.shape) / own))

    @torch.no_grad()
    def _mask_weights(self, group: Group) -> None:
        """Weights outside of first masks are zero before the first forward pass. Collective where weights are split, or
        decide how many of each matrix stay."""
        members = [m for m in self._members[group["group_number"]].values() if m.parameter.requires_grad]
        if density_of(group) is None or not members or members[0].parameter.is_meta:
            return
        shards = [held_shard(member.parameter, member.position) for member in members]
        keys = self.settings(group)
        if keys["distribution"] in BY_WEIGHT:
            if any(shard.split for shard in shards):
                raise UnsupportedLayout(
                    f"distribution={keys['distribution']!r} ranks whole weights; build the optimizer before the model "
                    "is split, or choose uniform, er or erk"
                )
            density = density_at(0, keys)
            counts = budgets_by_weight([shard.parameter for shard in shards], density, keys["distribution"])
            # replicas may have weights of their own until an engine gives all of them those of process 0
            device = shards[0].parameter.device
            counts = ProcessGroup.of_replicas(device).send_from(torch.tensor(counts, device=device), 0).tolist()
            self._by_weight |= {shard.position: count for shard, count in zip(shards, counts, strict=True)}
        matrices = [Masked(shard, keys, {"step": torch.zeros((), device="cpu")}) for shard in shards]
        self._begin(matrices)
        for matrix in matrices:
            _keep_to_mask(matrix)


def _alike(matrices: Sequence[Masked]) -> list[list[Masked]]:
    """Matrices in lots that are chosen from together, in one order on every process."""
    lots: dict[tuple[str, torch.dtype, torch.device], list[Masked]] = {}
    for matrix in matrices:
        kind = matrix.group["structure"], matrix.key_dtype, matrix.weights.device
        lots.setdefault(kind, []).append(matrix)
    return list(lots.values())


def _keep_to_mask(matrix: Masked) -> None:
    W, at = matrix.weights, matrix.indices.long()
    if len(at) < len(W):
        held = W[at]
        W.zero_().index_copy_(0, at, held)


def _take(matrix: Masked, change: Change) -> None:
    """Go over to a new mask. What was not in the old one has weight and moments zero; so has, with
    ``reinit_when_same``, what was dropped and grown in one."""
    state, W, new = matrix.state, matrix.weights, change.indices
    old = matrix.indices
    place, there = _places_in(old, new)
    if matrix.group["reinit_when_same"]:
        there &= _places_in(change.kept, new)[1]
    held = W[new.long()].masked_fill_(~there, 0)
    W.zero_().index_copy_(0, new.long(), held)
    for key in MOMENTS:
        moments = state[key]
        state[key] = moments[place].masked_fill_(~there, 0) if len(moments) else moments.new_zeros(len(new))
    state["indices"] = new


def _places_in(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of ``new`` is in ``old``, both ascending, and whether it is."""
    if not len(old):
        return torch.zeros_like(new, dtype=torch.int64), torch.zeros_like(new, dtype=torch.bool)
    place = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    return place, old[place] == new


class SparseAdamW(SparseOptimizer):
    """AdamW on a part of each matrix's weights, by any combination of the published choices.

    Groups with a ``sparsity`` (or ``density``) hold matrices and are masked, others get plain AdamW;
    ``gracile.optim.param_groups(model, sparsity=0.9)`` makes them. Masks are drawn, and weights outside of them set to
    zero, when the optimizer is built, also of a model that is split already; a matrix that is as sparse as it should be
    keeps its mask.

    Args:
        params: parameters, named parameters or groups, as for ``torch.optim.AdamW``.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        sparsity: the share of a group's weights that is zero; None for plain AdamW.
        density: 1 - sparsity, in its place.
        drop: which weights go: the smallest ``magnitude``; the smallest ``gradient_magnitude``, |w| + drop_lambda |g|
            (MEST: Yuan et al. 2021, arXiv:2110.14032); or ``random``.
        grow: which come: the largest ``gradient`` (RigL); the largest ``momentum`` of all gradients (SNFS: Dettmers &
            Zettlemoyer 2019, arXiv:1907.04840), which costs a dense moment; or ``random`` (SET).
        distribution: of the weights over a group's matrices: ``uniform``, ``er``, ``erk``, ``lamp``, ``global``.
        schedule: how ``drop_fraction`` falls to ``t_end``: ``cosine``, ``cubic`` or ``constant``.
        structure: ``unstructured``, ``constant_fan_in`` or ``block``.
        update_every: steps between changes of the masks.
        drop_fraction: the share of a mask that changes, at first; 0 keeps the first masks.
        t_begin, t_end: steps between which masks change. RigL's t_end is three quarters of the run. None, without an
            end, goes with ``schedule="constant"``.
        initial_sparsity: where given, sparsity rises from it to ``sparsity`` at ``t_end`` by a cubic.
        init: first masks are ``random``, or of the largest ``magnitude``; None: random but for lamp and global.
        rescale_init: multiply weights that are masked for the first time by 1 / sqrt(density), as fan-in asks.
        reinit_when_same: a weight that is dropped and grown in one update starts from zero, and does not stay.
        drop_lambda: weight of gradients in ``gradient_magnitude``.
        gamma_sal: of ``constant_fan_in``, the share of salient weights below which a row is ablated (0.3).
        block_size: of ``block`` (64).
        seed: of what is drawn.
        state_dtype: dtype of the moments; None for fp32, or wider where the parameter is.

    State of an m x n matrix that keeps K weights: ``indices`` (int32) and two moments of K elements, and a counter.

    Raises:
        ValueError: at construction, naming key and value, for an unknown key or a value out of range.
        RuntimeError: at ``step``, for sparse gradients, or parameters split in an unknown way (UnsupportedLayout).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        drop: str = "magnitude",
        grow: str = "gradient",
        distribution: str = "uniform",
        schedule: str = "cosine",
        structure: str = "unstructured",
        update_every: int = 100,
        drop_fraction: float = 0.3,
        t_begin: int = 0,
        t_end: int | None = None,
        initial_sparsity: float | None = None,
        init: str | None = None,
        rescale_init: bool = False,
        reinit_when_same: bool = False,
        drop_lambda: float = 1e-3,
        gamma_sal: float | None = None,
        block_size: int | None = None,
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, locals())
