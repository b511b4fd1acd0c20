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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..core.batches import Direction, ask
from ..core.clock import steps_of
from ..core.group_checks import check_contiguous
from ..core.optimizer import FIND, ShardedOptimizer
from ..core.projected_gradient import Kept, ProjectedGradient
from ..core.rules import MOMENTS, TORCH_ADAM
from ..core.types import Group, ParamStep, State
from ..distributed import (
    FullShard,
    ProcessGroup,
    UnsupportedLayout,
    Workspace,
    blocked,
    full_shape,
    held_shard,
    is_large,
    spans,
)
from ..numbers import add_, decay_of, is_zero
from ..state.spec import INDICES, Coordinates, Placement, StateSpec, moment_dtype
from .alike_masks import Wanted, is_whole
from .alike_structures import changed_together
from .experts import are_transposed, as_matrix, check_transposed, experts_of, matrices_in
from .frozen_weights import (
    START,
    Chosen,
    decay_,
    is_frozen_outside,
    is_reselected,
    start_spec,
    take_selections,
)
from .gather_scatter import PlacedUpdate, Places
from .grown_weights import BORN, aged_adam, born_spec
from .kept_entries import EntriesOfMask, check_whole, columns_outside, entries_of
from .layer_budgets import BY_SHAPE, BY_WEIGHT, budgets_by_weight
from .mask_schedule import (
    STRUCTURES,
    check_masks,
    counts_after,
    density_at,
    density_of,
    drop_fraction_at,
    is_due,
    with_defaults,
)
from .mask_state import Flattened, Indices, Packed
from .masks import Change, Masked, MatricesOf, Structure, nonzeros, weights_held

INT32 = 2**31 - 1


class SparseOptimizer(ShardedOptimizer):
    """The loop above. ``fixed`` holds what a method has chosen: keys that its groups do not have.

    State of an m x n matrix that keeps K weights: ``indices`` (K, int32), the ascending places of those that this
    process holds in its part, ``exp_avg`` and ``exp_avg_sq`` (K), a counter, and with ``grow="momentum"`` also
    ``momentum`` (m n). How many of K lie in a process's part changes with the mask.
    """

    rule = TORCH_ADAM
    matrix_key = "sparsity"
    fixed: ClassVar[Mapping[str, Any]] = {}
    keeps_coordinates = True
    later_keys: ClassVar[Mapping[str, Any]] = {
        **ShardedOptimizer.later_keys,
        "grown_step": "shared",
        "grown_warmup": 0,
    }
    _is_built = False
    _in_masks: frozenset[int] = frozenset()  # by position, matrices whose weights keep to their masks: not loaded since

    def __init__(self, params: ParamsT, arguments: Group) -> None:
        self._by_weight: dict[int, list[int]] = {}  # left to a parameter's matrices, by position, until they have masks
        self._selected: dict[int, Chosen] = {}  # by position, what first masks are where that was said
        super().__init__(params, arguments)
        for group in self.param_groups:
            self._mask_weights(group)
        self._is_built = True

    # ---- groups -------------------------------------------------------------------------------------------------

    def settings(self, group: Group) -> Group:
        """A group's keys and what the method has chosen."""
        return with_defaults({**self.later_keys, **self.fixed, **group})

    def structure(self, group: Group) -> Structure:
        return STRUCTURES[{**self.fixed, **group}["structure"]]

    def is_for_matrices(self, group: Group) -> bool:
        return density_of(group) is not None

    @classmethod
    def is_matrix(cls, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2

    def check_group(self, group: Group) -> None:
        if any(keys[key] is not None for keys in (group, self.defaults) for key in ("sparsity", "density")):
            check_masks({**self.fixed, **group})

    def check_shape(self, shape: tuple[int, ...], group: Group) -> None:
        density = density_of(group)
        if density is not None and len(shape) < 2:
            raise ValueError(
                f"sparsity={1 - density:g} needs matrices, got a parameter of shape {shape}; put it into a "
                "group without a sparsity (gracile.optim.param_groups does)"
            )
        if math.prod(shape) > INT32:
            raise ValueError(f"places are 32-bit numbers; a parameter of shape {shape} has more than 2^31 - 1 of them")
        check_transposed(shape, group)
        self.structure(group).check_shape(as_matrix(shape, are_transposed(group)), self.settings(group))

    def check_parameters(self, parameters: Sequence[Tensor], group: Group) -> None:
        if not self.is_for_matrices(group):
            return
        check_contiguous(parameters)
        shapes = [full_shape(p) for p in parameters]
        if self.settings(group)["distribution"] in BY_SHAPE:
            for shape, units in zip(shapes, counts_after(None, shapes, self.settings(group)), strict=True):
                if 0 not in shape:
                    self.structure(group).check_budget(min(units), as_matrix(shape, are_transposed(group)))

    def add_param_group(self, param_group: Group) -> None:
        group, selected = take_selections(self.with_own_names(param_group), self.defaults)
        super().add_param_group(group)
        refs = self.registry.of_group(self.param_groups[-1]) if selected else []
        # under a wrapper, refs are those of all processes
        self._selected |= {ref.position: selected[id(ref.parameter)] for ref in refs if id(ref.parameter) in selected}
        if self._is_built:
            self._mask_weights(self.param_groups[-1])

    # ---- how many -----------------------------------------------------------------------------------------------

    def counts_at(self, group: Group, step: int | None) -> dict[int, list[int]]:
        """How many units stay of the matrices of each of a group's parameters, by position among all, also of those
        that are frozen now: to freeze one leaves the others what they have. Of ``BY_SHAPE``."""
        refs = self.registry.of_group(group)
        counts = counts_after(step, [ref.shape for ref in refs], self.settings(group))
        return {ref.position: count for ref, count in zip(refs, counts, strict=True)}

    # ---- state --------------------------------------------------------------------------------------------------

    def state_specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        """Empty masks: all matrices of a step are given theirs together. In a plan, as many weights as will be."""
        if not self.is_for_matrices(group):
            return super().state_specs(shard, group)
        count, dtype = self._planned_weights(shard, group), moment_dtype(shard, group)
        by_element = Coordinates(shard.shape, Placement.ELEMENTS)
        packed = Packed(*count)
        mask = replace(by_element.spec("mask", torch.uint8), kind=INDICES, codec=Indices(*count))
        moments = [spec.stored_by(packed) for spec in self.rule.specs(by_element, dtype, group)]
        specs = [mask, *moments]
        if group["grown_step"] == "own":
            specs.append(born_spec(by_element, packed))
        if group.get("decay_to") == "start":
            specs.append(start_spec(by_element, shard, packed))
        if self.settings(group)["grow"] == "momentum":
            specs.append(by_element.spec("momentum", dtype).stored_by(Flattened()))
        return specs

    def _planned_weights(self, shard: FullShard, group: Group) -> tuple[int, int]:
        """How many weights the first masks of a parameter have, and the most that masks of it may have."""
        if 0 in shard.shape:
            return 0, 0
        if shard.position in self._selected:
            return (self._selected[shard.position].count,) * 2
        keys = self.settings(group)
        structure = self.structure(group)
        shape = as_matrix(shard.shape, are_transposed(group))
        whole = structure.units(shape, keys)
        if keys["distribution"] in BY_WEIGHT:
            own = matrices_in(shard.shape) * whole
            together = sum(math.prod(ref.shape) for ref in self.registry.of_group(group))
            return round(density_at(0, keys) * own), min(own, round(density_at(0, keys) * together))
        planned = most = 0
        for first, last in zip(*(self.counts_at(group, step)[shard.position] for step in (0, None)), strict=True):
            # between them, shares that are rounded together may come out one higher
            most += first if first == last else min(max(first, last) + 1, whole)
            planned += first - first % shape[0] if keys["structure"] == "constant_fan_in" else first
        return structure.weights(planned, keys), structure.weights(most, keys)

    def forget(self) -> None:
        super().forget()
        self._in_masks = frozenset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._is_built = True  # of what is unpickled, torch keeps groups, state and defaults alone
        if not hasattr(self, "_by_weight"):
            self._by_weight = {}
        if not hasattr(self, "_selected"):
            self._selected = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_selected": self._selected}

    # ---- gradients that are freed ---------------------------------------------------------------------------------

    def why_all_is_needed(self, group: Group) -> str | None:
        if self.is_for_matrices(group) and self.settings(group)["grow"] == "momentum":
            return f"grow='momentum' of {type(self).__name__} averages all of a gradient"
        return None

    @torch.no_grad()
    def reduction_of(self, parameter: Tensor, group: Group, refresh: bool) -> Callable[[Tensor], Kept] | None:
        """Not where a mask changes after the step, and gradients say how. First masks are drawn now: by chance or by
        weights, each by itself."""
        if not self.is_for_matrices(group) or 0 in parameter.shape:
            return None
        for shard, state in self._born(parameter, group, Workspace()):
            keys = self.settings(group)
            if _asks_gradients(keys) and is_due({"step": state["step"] + 1}, keys):
                return None
            self.find([ParamStep(shard, group, state)])
            seed = 1009 * shard.position + steps_of(state)
            return EntriesOfMask(Places(shard, group, state["indices"]), seed)
        return None

    def kept_together(self, group: Group, one_pass: bool) -> list[list[Tensor]]:
        keys = self.settings(group)
        moves = keys["drop_fraction"] > 0 or keys["initial_sparsity"] is not None
        return super().kept_together(group, one_pass) if moves and _asks_gradients(keys) else []

    def reduced_size(self, parameter: Tensor, group: Group) -> int:
        ref = self.registry.find(parameter, group)
        if ref is None or 0 in ref.shape:
            return parameter.numel()
        _, most = self._planned_weights(self.on_meta(ref, group), group)
        return most + columns_outside(parameter.shape) * (parameter.numel() // parameter.shape[-1])

    # ---- a step -------------------------------------------------------------------------------------------------

    def moves_by_direction(self, shard: FullShard, group: Group) -> bool:
        return group["grown_step"] != "own" if self.is_for_matrices(group) else super().moves_by_direction(shard, group)

    def direction(self, G: Tensor, shard: FullShard, group: Group, state: State) -> Direction:
        if not self.is_for_matrices(group):
            return (yield from super().direction(G, shard, group, state))
        M = Places(shard, group, state["indices"])
        if "momentum" in state:
            _follow(state["momentum"], G.reshape(-1), group)
        R = entries_of(G, M)
        if group["grown_step"] == "own":
            return PlacedUpdate(M, aged_adam(R, state, group)), 1.0
        N, correction = yield R, state
        return PlacedUpdate(M, N), correction

    def update(self, G: Tensor, shard: FullShard, group: Group, state: State) -> None:
        masked = self.is_for_matrices(group)
        by_places = masked and shard.round_places is not None  # weights are rounded by chance as they are written
        if masked and is_frozen_outside(group) and not by_places:
            group = decay_(shard, group, state)
        whole = not masked or shard.split
        if whole or not (by_places or is_large(state["indices"].shape)):
            super().update(G, shard, group, state)
            return
        if "momentum" in state:
            for span in spans(G.numel(), blocked.BLOCK):
                _follow(state["momentum"][span], G.reshape(-1)[span], group)
        W, decay = shard.parameter.view(-1), decay_of(group)
        if not is_zero(decay) and shard.round_block is None:
            W.mul_(1 - decay)
        places = Places(shard, group, state["indices"])
        kept = entries_of(G, places) if isinstance(G, ProjectedGradient) else None
        for span in spans(len(state["indices"]), places.unit(blocked.BLOCK)):
            M = Places(shard, group, state["indices"][span])
            own = {key: state[key][span] for key in (*MOMENTS, BORN, START) if key in state}
            R = M.of(G.reshape(-1)) if kept is None else kept[span]
            self._move_some(M, R, W, shard, group, {"step": state["step"], **own})

    def _move_some(self, M: Places, R: Tensor, W: Tensor, shard: FullShard, group: Group, state: State) -> None:
        """Some weights of a large mask; W is flat."""
        if group["grown_step"] == "own":
            N, step = aged_adam(R, state, group), -group["lr"]
        else:
            N, correction = ask(self.rule, R, state, group, shard)
            step = -group["lr"] * correction
        if shard.round_places is None:
            M.add_(W, N, step)
            return
        narrow = M.of(W)
        wide = narrow.float()
        towards = state[START].float() if START in state else 0.0
        wide = add_(wide.sub_(towards).mul_(1 - decay_of(group)).add_(towards), N, step)
        shard.round_places(narrow, wide, M.indices)
        M.put_(W, narrow)

    def update_each(
        self, gradients: Sequence[Tensor], shards: Sequence[FullShard], group: Group, states: Sequence[State]
    ) -> None:
        if self.is_for_matrices(group) and is_frozen_outside(group):
            group = [decay_(shard, group, state) for shard, state in zip(shards, states, strict=True)][-1]
        super().update_each(gradients, shards, group, states)

    def find(self, work: list[ParamStep]) -> None:
        """First masks, for matrices that have none; weights outside of masks are zero from here on, or frozen."""
        loose = list(self._masked([item for item in work if item.shard.position not in self._in_masks]))
        if not loose:
            return
        first = [matrix for matrix in loose if matrix.clock == 0]
        if first:
            with self.phase(FIND):
                self._begin(first)
        for matrix in loose:
            _keep_to_mask(matrix)
        self._in_masks |= {matrix.shard.position for matrix in loose}

    def _masked(self, work: Sequence[ParamStep]) -> Iterator[Masked]:
        for item in work:
            if self.is_for_matrices(item.group):
                yield Masked(item.shard, self.settings(item.group), item.state)

    def after_each(self, work: list[ParamStep]) -> None:
        """Masks change, of all matrices together that are due; or are chosen anew, with state as at first."""
        due = [
            item
            for item in work
            if self.is_for_matrices(item.group) and is_due(item.state, {**self.fixed, **item.group})
        ]
        if due:
            check_whole(item for item in due if _asks_gradients(self.settings(item.group)))
            with self.phase(FIND):
                self._change(list(self._masked(due)))
        anew = [item for item in work if self.is_for_matrices(item.group) and is_reselected(item.group, item.state)]
        if anew:
            for item in anew:
                item.state["step"].zero_()
            with self.phase(FIND):
                self._begin(list(self._masked(anew)))

    def _change(self, parameters: list[Masked]) -> None:
        for alike in _alike(parameters):
            structure = STRUCTURES[alike[0].group["structure"]]
            each = MatricesOf(alike)
            held = weights_held(each.matrices)
            budgeted = self._budgets(each.matrices, held)
            keep, grow = [], []
            for matrix, weights, budget in zip(each.matrices, held, budgeted, strict=True):
                units = weights // structure.weights(1, matrix.group)
                fraction = drop_fraction_at(matrix.clock, matrix.group)
                kept, grown = structure.amounts(units, budget, fraction)
                keep.append(kept)
                grow.append(grown)
            changes = _changes(structure, list(map(Wanted, each.matrices, budgeted, keep, grow)))
            kept_of_each = each.joined([change.kept for change in changes])
            new_of_each = each.joined([change.indices for change in changes])
            for parameter, kept_places, new in zip(alike, kept_of_each, new_of_each, strict=True):
                if parameter.indices is not new:
                    _take(parameter, Change(kept_places, new))

    def _budgets(self, batch: Sequence[Masked], held: Sequence[int]) -> list[int]:
        """How many units each mask of a batch has after this step; where weights decide, as many as it has."""
        counts: dict[tuple[int, int], dict[int, list[int]]] = {}  # by group and clock
        found = []
        for matrix, weights in zip(batch, held, strict=True):
            now, position = (matrix.group["group_number"], matrix.clock), matrix.shard.position
            if matrix.group["distribution"] in BY_WEIGHT:
                left = self._by_weight.get(position) if matrix.clock == 0 else None
                found.append(weights if left is None else left[matrix.expert or 0])
                continue
            if now not in counts:
                counts[now] = self.counts_at(matrix.group, matrix.clock)
            of_each = counts[now][position]
            if matrix.expert is None and len(of_each) > 1:
                raise UnsupportedLayout(f"experts came as a tensor of shape {matrix.shard.shape}, without matrices")
            found.append(of_each[matrix.expert or 0])
        return found

    def _begin(self, parameters: Sequence[Masked]) -> None:
        """Draw first masks into the state of parameters that have none."""
        drawn = []
        for parameter in parameters:
            chosen = self._selected.get(parameter.shard.position)
            if chosen is None:
                drawn.append(parameter)
            else:
                places = chosen.selection.places(parameter.begin, parameter.weights, parameter.shard.shape)
                _give(parameter, places)
        for alike in _alike(drawn):
            structure = STRUCTURES[alike[0].group["structure"]]
            each = MatricesOf(alike)
            held = _told_by_zeros(each.matrices)
            budgeted = self._budgets(each.matrices, held)
            begun = structure.begin(each.matrices, budgeted, held)
            for parameter, indices in zip(alike, each.joined(begun), strict=True):
                _give(parameter, indices)
            for matrix, count, weights in zip(each.matrices, budgeted, held, strict=True):
                own = structure.weights(count, matrix.group)
                if matrix.group["rescale_init"] and weights > own > 0:
                    matrix.shard.parameter.mul_(math.sqrt(math.prod(matrix.shape) / own))

    @torch.no_grad()
    def _mask_weights(self, group: Group) -> None:
        """Weights outside of first masks are zero before the first forward pass. Collective where weights are split, or
        decide how many of each matrix stay."""
        refs = [ref for ref in self.registry.of_group(group) if ref.parameter.requires_grad]
        if not self.is_for_matrices(group) or not refs or refs[0].parameter.is_meta:
            return
        shards = [held_shard(ref.parameter, ref.position) for ref in refs]
        keys = self.settings(group)
        if keys["distribution"] in BY_WEIGHT:
            if any(shard.split for shard in shards):
                raise UnsupportedLayout(
                    f"distribution={keys['distribution']!r} ranks whole weights; build the optimizer before the model "
                    "is split, or choose uniform, er or erk"
                )
            density = density_at(0, keys)
            each = [expert.shard.parameter for shard in shards for expert in experts_of(shard)]
            counts = budgets_by_weight(each, density, keys["distribution"])
            # replicas may have weights of their own until an engine gives all of them those of process 0
            device = shards[0].device
            own = iter(ProcessGroup.of_replicas(device).broadcast_(torch.tensor(counts, device=device), 0).tolist())
            self._by_weight |= {s.position: [next(own) for _ in range(matrices_in(s.shape))] for s in shards}
        shards = [] if is_frozen_outside(keys) else [shard for shard in shards if 0 not in shard.shape]
        parameters = [Masked(shard, keys, {"step": torch.zeros((), device="cpu")}) for shard in shards]
        self._begin(parameters)
        for parameter in parameters:
            _keep_to_mask(parameter)


def _alike(matrices: Sequence[Masked]) -> list[list[Masked]]:
    """Parameters whose masks are chosen together, in one order on every process."""
    batches: dict[tuple[object, ...], list[Masked]] = {}
    for matrix in matrices:
        kind = matrix.group["structure"], matrix.key_dtype, matrix.device, is_frozen_outside(matrix.group)
        batches.setdefault(kind, []).append(matrix)
    return list(batches.values())


def _changes(structure: Structure, wanted: Sequence[Wanted]) -> list[Change]:
    """New masks of matrices; those that were changed together, and are parameters, have gone over to them."""
    together = {id(m): change for m, change in changed_together([own for own in wanted if is_whole(own.matrix)])}
    alone = [own for own in wanted if id(own.matrix) not in together]
    changes = iter(
        structure.change(
            [own.matrix for own in alone],
            [own.budget for own in alone],
            [own.keep for own in alone],
            [own.grow for own in alone],
        )
    )
    return [together[id(own.matrix)] if id(own.matrix) in together else next(changes) for own in wanted]


def _told_by_zeros(matrices: Sequence[Masked]) -> list[int]:
    """How many weights of each are not zero, of which a first mask may be; where zeros tell nothing, more than a mask
    can have. Collective."""
    frozen = bool(matrices) and is_frozen_outside(matrices[0].group)
    return [math.prod(matrix.shape) + 1 for matrix in matrices] if frozen else nonzeros(matrices)


def _give(matrix: Masked, indices: Tensor) -> None:
    """First masks, and moments for their weights."""
    matrix.state["indices"] = indices
    for key in (*MOMENTS, BORN):
        if key in matrix.state:
            matrix.state[key] = matrix.state[key].new_zeros(len(indices))
    if START in matrix.state:
        matrix.state[START] = matrix.weights.index_select(0, indices).to(matrix.state[START].dtype)


def _asks_gradients(keys: Group) -> bool:
    """Whether gradients say which weights come or go when a mask changes."""
    return "gradient" in (keys["grow"], keys["drop"].removesuffix("_magnitude"))


def _follow(momentum: Tensor, gradient: Tensor, group: Group) -> None:
    momentum.lerp_(gradient.to(momentum.dtype), 1 - group["betas"][0])


def _keep_to_mask(matrix: Masked) -> None:
    W, indices = matrix.weights, matrix.indices
    if len(indices) == len(W) or is_frozen_outside(matrix.group):
        return
    outside = torch.ones_like(W, dtype=torch.bool)
    for at in torch.split(indices, blocked.BLOCK):
        outside.index_fill_(0, at.long(), False)
    W.masked_fill_(outside, 0)


def _take(matrix: Masked, change: Change) -> None:
    """Go over to a new mask. What was not in the old one has moments zero, and weight zero but where weights outside
    keep their values; so has, with ``reinit_when_same``, what was dropped and grown in one."""
    state, W, new = matrix.state, matrix.weights, change.indices
    old = matrix.indices
    place, there = _places_in(old, new)
    if matrix.group["reinit_when_same"]:
        there &= _places_in(change.kept, new)[1]
    held = W[new.long()]
    if not is_frozen_outside(matrix.group):
        W.zero_().index_copy_(0, new.long(), held.masked_fill_(~there, 0))
    if START in state:
        of_kept = state[START][place] if len(old) else held.to(state[START].dtype)
        state[START] = torch.where(there, of_kept, held.to(of_kept.dtype))
    for key, first in [*((key, 0) for key in MOMENTS), *([(BORN, matrix.clock)] if BORN in state else [])]:
        values = state[key]
        state[key] = values[place].masked_fill_(~there, first) if len(values) else values.new_full((len(new),), first)
    state["indices"] = new


def _places_in(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of ``new`` is in ``old``, both ascending, and whether it is."""
    if not len(old):
        return torch.zeros_like(new, dtype=torch.int64), torch.zeros_like(new, dtype=torch.bool)
    place = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    return place, old[place] == new
