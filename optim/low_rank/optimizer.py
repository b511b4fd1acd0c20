"""The optimizer of methods whose moments live in a subspace of rank r of each matrix.

For a matrix W (m x n) with gradient G, the picture for m >= n (right; transpose it for left):

    every T steps    P  <-  find_basis(G)                                     n x r    store_basis
                     P   =  basis()                                           n x r    columns
                     W  <-  W - lr * direction(G, P, moments)                 m x n    the method's

A matrix's lines are gathered once a step: a new basis is found, and the matrix moved, before the next one's are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import Check, finite, one_of, require, whole
from ..core.batches import Direction, is_born_small, is_stacked_at, launches_cost
from ..core.capture import NEVER
from ..core.clock import steps_of
from ..core.optimizer import FIND, ShardedOptimizer
from ..core.projected_gradient import OUTSIDE, Kept, ProjectedGradient
from ..core.types import Group, ParamStep, State
from ..distributed import (
    APART,
    PROJ_TYPES,
    Experts,
    FullMatrix,
    FullShard,
    MatrixShard,
    ParamRef,
    PendingSolve,
    ProjectionSide,
    Workspace,
    complete_gradients,
    has_subspace,
    is_dtensor,
    stack_of,
)
from ..state.spec import PLAIN, StateSpec, basis_spec
from .basis import Basis, first_columns
from .first_gradients import FirstGradients
from .published import Published, PublishedState, is_foreign
from .singular import (
    SUBSPACE_METHODS,
    Columns,
    PendingIteration,
    leading_singular_vectors,
    orthogonal_iteration,
)

LARGEST = 1.01  # no entry of a unit vector is larger, but for rounding in bf16; NaN is not as small
FOUND_AT_ONCE = 2**23  # elements of bases that a GPU finds together: 160 MiB for what it makes of them, in fp64


def _optional_flag(key: str, value: object) -> None:
    require(value is None or isinstance(value, bool), f"{key} must be True, False or None", value)


class LowRankOptimizer(ShardedOptimizer):
    """Base of the methods with a subspace: groups with a ``rank`` hold matrices, others get the plain rule.

    A method says by ``low_rank_direction`` where a matrix goes, and where its subspace is not GaLore's, by
    ``find_basis`` what it is, by ``basis_specs``, ``store_basis`` and ``columns`` how it is kept, and by ``due_in``
    when it is found anew.

    Attributes:
        published: what the published class of the same name keeps in its state; None where there is none.
        finds_together: whether a GPU may find the subspaces of many matrices before any of them moves: not where each
            needs a matrix of its own for it.
        moves_together: whether ``low_rank_direction`` may be asked for many matrices before any of them moves.
        stack_copies: how many tensors of B x m x n are made to move a stack of matrices, its gradient among them; 0
            where ``update`` is written for one matrix.
        few_kernels: whether a matrix is moved by so few kernels that a large one is not worth being stacked.
    """

    matrix_key = "rank"
    moves_int8_weights: ClassVar[bool] = True
    published: ClassVar[Published | None] = None
    subspace_methods: ClassVar[tuple[str, ...]] = SUBSPACE_METHODS
    finds_together: ClassVar[bool] = True
    moves_together: ClassVar[bool] = False
    stack_copies: ClassVar[int] = 0
    few_kernels: ClassVar[bool] = False
    only_read: ClassVar[tuple[str, ...]] = ("basis",)
    checks: ClassVar[Mapping[str, Check]] = {
        "rank": whole(1, optional=True),
        "proj_type": one_of(*PROJ_TYPES),
        "update_proj_gap": whole(1),
        "scale": finite(),
        "shard_basis": _optional_flag,
        "refreshes_at_once": whole(1, optional=True),
    }
    _found_early: dict[int, Tensor]  # by position: whether the columns are usable that were found in the backward pass
    _warned_non_finite = False  # a class attribute: torch's __getstate__ keeps no others through pickle

    def __init__(self, params: ParamsT, arguments: Group) -> None:
        super().__init__(params, arguments)
        self._first_gradients, self._found_early = FirstGradients(), {}

    @classmethod
    def is_matrix(cls, shape: tuple[int, ...]) -> bool:
        """A matrix, or the experts of a layer in one tensor (E, m, n), which are E of them."""
        return len(shape) in (2, 3)

    def check_group(self, group: Group) -> None:
        if "subspace_method" in group:
            one_of(*self.subspace_methods)("subspace_method", group["subspace_method"])

    def check_parameters(self, parameters: Sequence[Tensor], group: Group) -> None:
        at_once, count = group.get("refreshes_at_once"), len(parameters)
        if at_once is None or not self.is_for_matrices(group) or count <= at_once * group["update_proj_gap"]:
            return
        gap = group["update_proj_gap"]
        raise ValueError(
            f"refreshes_at_once={at_once} is too few for {count} matrices in update_proj_gap={gap} steps; give "
            f"{-(-count // gap)} or more"
        )

    def check_shape(self, shape: tuple[int, ...], group: Group) -> None:
        if not self.is_matrix(shape):
            raise ValueError(
                f"rank={group['rank']} needs matrices, or experts (E, m, n), got a parameter of shape {shape}; "
                "put it into a group without a rank (gracile.optim.param_groups does)"
            )

    # ---- what a method says -----------------------------------------------------------------------------------------

    def projection_side(self, shape: tuple[int, int], group: Group) -> ProjectionSide:
        return ProjectionSide.of(shape, group["rank"], group["proj_type"])

    def state_specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        moments = self.moment_specs(shard, group)
        return [*self.basis_specs(shard, group), *moments] if has_subspace(shard) else moments

    def basis_specs(self, shard: FullMatrix, group: Group) -> list[StateSpec]:
        """What a matrix keeps beside the rule's moments: its basis, by default in the parameter's dtype."""
        return [basis_spec(shard)]

    def initialize(self, shard: FullShard, group: Group, state: State) -> None:
        if has_subspace(shard) and "basis" in state:
            columns = first_columns(shard.side, state["basis"].dtype, shard.device)
            self.store_basis(columns, torch.ones((), dtype=torch.bool, device=shard.device), shard, group, state)

    def due_in(self, shard: FullShard, group: Group, state: State) -> int:
        """How many steps a matrix takes before it needs a new basis: before its steps 0, T, 2T, ..., or, where only
        some are refreshed at once, 0 and those of its turn."""
        steps = steps_of(state)
        return (self.turn_of(shard, group) - steps) % int(group["update_proj_gap"]) if steps else 0

    def waits_for_gradient(self, group: Group) -> bool:
        """Whether a subspace comes from the gradient: a matrix that had none yet, or none that is finite, stays due."""
        return True

    def find_basis(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Columns:
        """The new columns of one matrix (side x r). Non-finite ones are not taken over. Collective."""
        return self.singular_vectors(G, self.previous_columns(shard, group, state), shard, group)

    def store_basis(self, columns: Tensor, usable: Tensor, shard: FullMatrix, group: Group, state: State) -> None:
        """Write new columns into ``state`` where ``usable``, a flag on the device."""
        state["basis"].copy_(torch.where(usable, shard.shard_rows(columns), state["basis"]))

    def stores_stacks(self, group: Group) -> bool:
        """Whether ``store_basis`` takes a stack."""
        return True

    def columns(self, shard: FullMatrix, group: Group, state: State) -> Tensor:
        """P of one matrix (side x r), from how the state keeps it. Collective where each process keeps a part."""
        return shard.all_gather_rows(state["basis"], shard.side.basis_shape[0])

    def after_refresh(self, work: list[ParamStep]) -> None:
        """Called once a step, when all have moved, with the matrices that got new columns in it."""

    def low_rank_direction(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Direction:
        """The method's ``direction`` for one matrix (m x n). Collective."""
        raise NotImplementedError

    # ---- state that is loaded ---------------------------------------------------------------------------------------

    def own_form(self, parameter: Tensor, group: Group, saved: Mapping[str, Any]) -> dict[str, Any] | None:
        ref = self._ref(parameter, group)
        if self.published is None or ref is None or not is_foreign(saved):
            return super().own_form(parameter, group, saved)
        if is_dtensor(parameter):
            raise ValueError(
                f"the saved state of parameter {ref.position} is of a whole parameter, from {self.published.package}, "
                "and this one is split; load it by gracile.optim.load_full_state"
            )
        return self.published_state(ref, group, saved, parameter.device)

    def published_state(
        self, ref: ParamRef, group: Group, saved: Mapping[str, Any], device: torch.device
    ) -> dict[str, Any] | None:
        """The state of a whole parameter as it is kept here, of which ``saved`` is that of the published class; None
        where the parameter has not moved yet.

        Raises:
            ValueError: where this class would not go on as that one.
        """
        assert self.published is not None
        shard = self.on_meta(ref, group)
        if isinstance(shard, Experts):
            raise ValueError(
                f"the saved state of parameter {ref.position}, of shape {ref.shape}, cannot go on in "
                f"{type(self).__name__}: {self.published.package} projects matrices, and here it is {ref.shape[0]}"
            )
        try:
            return PublishedState(saved, self.published, shard, group, device).as_declared(self.specs(shard, group))
        except ValueError as reason:
            name = type(self).__name__
            raise ValueError(
                f"the saved state of parameter {ref.position}, of shape {ref.shape}, cannot go on in {name}: {reason}"
            ) from None

    def forget(self) -> None:
        super().forget()
        self._first_gradients.forget()
        self._found_early.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._first_gradients, self._found_early = FirstGradients(), {}

    # ---- what methods use -------------------------------------------------------------------------------------------

    def waited_for_gradient(self, shard: FullShard) -> bool:
        """Whether a matrix has moved before this step, and never with a gradient."""
        return self._first_gradients.missing(shard.position)

    def look_at_gradient(self, G: Tensor, shard: FullShard, usable: Tensor) -> None:
        """Note whether ``G``, which a subspace was found from, is one. Collective."""
        self._first_gradients.look_at(G, shard, usable)

    def basis(self, shard: FullMatrix, group: Group, state: State) -> Basis:
        """P of one matrix, to project onto and lift from. Collective, as ``columns``."""
        return Basis(self.columns(shard, group, state), shard.side)

    def previous_columns(self, shard: FullMatrix, group: Group, state: State) -> Tensor | None:
        """P of an earlier refresh; None before the first that saw a gradient."""
        if steps_of(state) == 0 or self._first_gradients.missing(shard.position):
            return None
        return self.columns(shard, group, state)

    def singular_vectors(self, dense: Tensor, previous: Tensor | None, shard: FullMatrix, group: Group) -> Columns:
        """The leading singular vectors of a matrix of which ``dense`` is this process's lines."""
        if group["subspace_method"] == "svd":
            return shard.solve(dense, partial(leading_singular_vectors, side=shard.side, previous=previous))
        sums = self.sums_of_subspace(shard, group)
        if self.finds_stacked(shard):
            return PendingIteration(dense, shard.side, previous, sums=sums)
        return orthogonal_iteration(shard.own(dense), shard.side, previous, shard.all_reduce_, sums=sums)

    def sums_of_subspace(self, shard: FullMatrix, group: Group) -> torch.dtype:
        """What the products are summed in that a subspace is found by, or the gradient's dtype if that is wider."""
        return torch.float32

    @torch.no_grad()
    def reduction_of(self, parameter: Tensor, group: Group, refresh: bool) -> Callable[[Tensor], Kept] | None:
        if not self.keeps_coordinates:
            return None
        for shard, state in self._born(parameter, group, Workspace()):
            if not has_subspace(shard):
                return None
            if isinstance(shard, MatrixShard):
                complete_gradients([shard])
            item = ParamStep(shard, group, state)
            self._first_gradients.recall([item] if self.waits_for_gradient(group) else [])
            item.is_due = self._is_due_now(item)
            if item.is_due and not refresh and self._is_its_turn(item):
                return None
            if item.is_due:
                self.find([item])
                assert item.usable is not None
                self._found_early[shard.position] = item.usable
            if shard.split:
                shard.let_gradient_go()  # which the shard holds by itself
            return partial(self._reduced, shard=shard, group=group, state=state)
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._found_early.clear()
        super().zero_grad(set_to_none)

    def reduced_size(self, parameter: Tensor, group: Group) -> int:
        """How many numbers are kept of a gradient by ``reduction_of``."""
        if parameter.dim() != 2:
            return parameter.numel()
        side = self.projection_side((parameter.shape[0], parameter.shape[1]), group)
        return math.prod(side.projected_shape) + side.lines * OUTSIDE

    def kept_together(self, group: Group, one_pass: bool) -> list[list[Tensor]]:
        if one_pass:
            return []
        at_once, held = group.get("refreshes_at_once"), group["params"]
        return [held[i : i + at_once] for i in range(0, len(held), at_once)] if at_once else [list(held)]

    def _reduced(self, G: Tensor, shard: FullMatrix, group: Group, state: State) -> Kept:
        """P anew for each gradient, for an unpacked one is not kept; the same directions for all passes of a step."""
        chance = torch.Generator(G.device).manual_seed(1009 * shard.position + steps_of(state))
        size = shard.side.basis_shape[0], OUTSIDE
        Z = torch.randn(size, generator=chance, device=G.device)
        return self.basis(shard, group, state).reduce(shard.lines_of(G), Z)

    def moves_by_direction(self, shard: FullShard, group: Group) -> bool:
        if not has_subspace(shard):
            return super().moves_by_direction(shard, group)
        small = is_stacked_at(math.prod(shard.side.shape), few_kernels=False)
        return self.moves_together and small and not shard.split  # of which lines and P are copies, one at a time

    def stack_numbers(self, item: ParamStep) -> int:
        shard = item.shard
        if not (self.stack_copies and has_subspace(shard)) or shard.split:
            return 0
        elements, r = math.prod(shard.side.shape), shard.side.rank
        if not is_stacked_at(elements, self.few_kernels):
            return 0
        wide = 0 if self.moment_codec is PLAIN else 3  # moments as numbers, and what is quantized of them
        return self.stack_copies * elements + r * ((2 + wide) * shard.side.lines + shard.side.line_length)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def portions(self, work: list[ParamStep]) -> Iterator[list[ParamStep]]:
        """Gradients that are gathered for a new basis are kept until their matrix has moved: only as many as
        processes can solve at the same time."""
        waiting = [item for item in work if has_subspace(item.shard) and self.waits_for_gradient(item.group)]
        self._first_gradients.recall(waiting)
        portion: list[ParamStep] = []
        due: list[ParamStep] = []
        for item in work:
            item.usable = self._found_early.pop(item.shard.position, None)
            item.is_due = item.usable is None and has_subspace(item.shard) and self._is_due_now(item)
            if item.is_due and due and not self._fits(item, due):
                yield portion
                portion, due = [], []
            portion.append(item)
            if item.is_due:
                due.append(item)
        if portion:
            yield portion

    def _fits(self, item: ParamStep, due: list[ParamStep]) -> bool:
        """Whether a subspace may be found together with those that are due before it."""
        if "svd" in (item.group.get("subspace_method"), item.group.get("proj")):
            return len(due) < item.matrix.solvers
        return self._is_found_together(item)

    def _is_found_together(self, item: ParamStep) -> bool:
        """Whether a subspace may be found before the matrices ahead of it have moved: their gradients stay."""
        copied = item.shard.maximize or not self.finds_together  # gradients, or what a subspace is found from
        small = is_stacked_at(math.prod(item.shard.shape), few_kernels=False)
        return small and self.finds_stacked(item.shard) and not copied

    def finds_stacked(self, shard: FullShard) -> bool:
        """Whether the subspaces of alike matrices are found as one."""
        return not shard.split and (launches_cost(shard.device) or is_born_small(shard))

    def _is_due_now(self, item: ParamStep) -> bool:
        waits = self.waits_for_gradient(item.group) and self.waited_for_gradient(item.shard)
        return waits or self.due_in(item.shard, item.group, item.state) == 0

    def turn_of(self, shard: FullShard, group: Group) -> int:
        """The step of every T in which a matrix is due: by its parameter's place in the group, as many as
        ``refreshes_at_once`` at a time; 0 without that key."""
        at_once = group.get("refreshes_at_once")
        if at_once is None:
            return 0
        place = shard.position % APART - self.registry.first_position(group)
        return int(place // at_once % group["update_proj_gap"])

    def _is_its_turn(self, item: ParamStep) -> bool:
        """Whether all of a step's gradient is kept for a new subspace. A first one that is due out of turn, with those
        of all other matrices, is found from the first pass."""
        if item.group.get("refreshes_at_once") is None:
            return True
        return steps_of(item.state) % int(item.group["update_proj_gap"]) == self.turn_of(item.shard, item.group)

    def ordinary_steps(self, item: ParamStep) -> int:
        if not has_subspace(item.shard):
            return NEVER
        if self.waits_for_gradient(item.group) and not self._first_gradients.seen(item.shard.position):
            return 0
        return self.due_in(item.shard, item.group, item.state)

    def find(self, work: list[ParamStep]) -> None:
        due = [item for item in work if item.is_due]
        if due:
            with self.phase(FIND):
                self.refresh(due)

    def refresh(self, due: list[ParamStep]) -> None:
        """New bases for some matrices: each process solves one before any of them is waited for. Collective."""
        due[0].shard.workspace.clear()  # a solve needs as much for something else
        for together in self._found_at_once(due):
            self._refresh(together)

    def _found_at_once(self, due: list[ParamStep]) -> Iterator[list[ParamStep]]:
        """Those that are alike, as many as memory is for, and the others."""
        waiting: dict[tuple[object, ...], list[ParamStep]] = {}
        for item in due:
            kind: tuple[object, ...] = ()
            if self._is_found_together(item):
                first = steps_of(item.state) == 0 or self.waited_for_gradient(item.shard)
                kind = item.matrix.side, id(item.group), item.gather_grad().dtype, item.shard.device, first
                most = FOUND_AT_ONCE // math.prod(item.matrix.side.basis_shape)
                if len(waiting.get(kind, [])) >= max(1, most):
                    yield waiting.pop(kind)
            waiting.setdefault(kind, []).append(item)
        yield from waiting.values()

    def _refresh(self, due: list[ParamStep]) -> None:
        if any(isinstance(item.shard.held_gradient, ProjectedGradient) for item in due):
            raise RuntimeError(
                "a matrix is due for a new subspace of whose gradient coordinates were kept: zero_grad() was not "
                "called after the last step, or its group or its state has changed since the backward pass; change "
                "them after step()"
            )
        found = [self.find_basis(item.gather_grad(), item.matrix, item.group, item.state) for item in due]
        for pending in found:
            if isinstance(pending, PendingSolve):
                pending.solve()
        begun = [one for one in found if isinstance(one, PendingIteration)]
        if begun and len(begun) == len(found):
            self._store_stack(begun[0].run(begun), due)
            return
        for item, pending in zip(due, found, strict=True):
            if isinstance(pending, PendingIteration):
                columns = pending.run([pending])[0]
            else:
                columns = pending.result() if isinstance(pending, PendingSolve) else pending
            self._store(columns, columns.abs().amax() <= LARGEST, item)

    def _store(self, columns: Tensor, usable: Tensor, item: ParamStep) -> None:
        """A non-finite gradient has no singular vectors, and of columns that are one to the last bit, as a constant
        gradient's, rounding makes no basis: keep the old ones, without asking the device."""
        item.usable = usable
        self._first_gradients.look_at(item.gathered, item.shard, usable)
        self.store_basis(columns, usable, item.matrix, item.group, item.state)

    def _store_stack(self, columns: Tensor, due: list[ParamStep]) -> None:
        """New columns of alike matrices (B x side x r)."""
        usable = columns.abs().amax(dim=(1, 2)) <= LARGEST
        if not self.stores_stacks(due[0].group):
            for item, own, flag in zip(due, columns, usable, strict=True):
                self._store(own, flag, item)
            return
        for item, flag in zip(due, usable, strict=True):
            item.usable = flag
            self._first_gradients.look_at(item.gathered, item.shard, flag)
        shard = stack_of([item.shard for item in due])
        state = shard.state([item.state for item in due])
        self.store_basis(columns, usable[:, None, None], shard, due[0].group, state)
        state.write_back()

    def direction(self, G: Tensor, shard: FullShard, group: Group, state: State) -> Direction:
        if has_subspace(shard):
            return self.low_rank_direction(G, shard, group, state)
        return super().direction(G, shard, group, state)

    def after_step(self, work: list[ParamStep]) -> None:
        refreshed = [item for item in work if item.usable is not None]
        if refreshed:
            self.after_refresh(refreshed)
        self._first_gradients.note()
        if not refreshed or self._warned_non_finite:
            return
        flags = [item.usable for item in refreshed if item.usable is not None]
        if not torch.stack([flag.to(flags[0].device) for flag in flags]).all():  # one host read for all matrices
            self._warned_non_finite = True
            warnings.warn(
                "a gradient was constant or not finite at a refresh; its matrix keeps its old subspace", stacklevel=9
            )
