"""The optimizer that every subspace method shares: groups, state, the refresh clock and ``step`` in three phases."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import is_real, is_whole, nearest, require
from ..distributed import (
    Cut,
    FlatShard,
    FullMatrix,
    FullShard,
    MatrixShard,
    ParamRef,
    PrefixedState,
    RowShard,
    ShardRange,
    Solving,
    UnsupportedLayout,
    complete,
    flat_tensors,
    full_shape,
    has_subspace,
    pieces_of,
    rows_of,
)
from ..distributed.projection import PROJ_TYPES, Basis, LowRankUpdate, ProjectionSide, Workspace, first_columns
from ..low_rank.singular import SUBSPACE_METHODS, leading_singular_vectors, orthogonal_iteration
from ..state.dtensor_state import DTensorState
from ..state.loading import FaithfulLoading
from .rules import ADAM, Rule

Group = dict[str, Any]
State = MutableMapping[str, Tensor]
NewState = dict[str, Tensor]

# Keys beside the constructor's: torch's named parameters, its LR schedulers, a label for humans, and our own number.
FOREIGN_KEYS = {"params", "param_names", "initial_lr", "name", "group_number"}


# From so many processes on, a basis on each would cost more than the moments: each keeps a part.
MANY = 8


class ParamStep(NamedTuple):
    """One parameter of this step."""

    shard: FullShard
    group: Group
    state: State


class ShardedOptimizer(FaithfulLoading):
    """Base of the optimizers whose moments live in a subspace of each matrix.

    A group with a ``rank`` holds matrices only; a group without one gets the plain rule. A method says three
    things: ``validate`` (its own group keys), ``init_state`` (its tensors) and ``direction`` (its paper). ``rule`` is
    what moves coordinates, and the parameters without a rank.

    State per parameter, tensors only: ``step`` (fp32 scalar), the rule's moments, and for a matrix ``basis``, r
    orthonormal columns in the parameter's dtype. All of it is born at the first ``step()``, for every trainable
    parameter, so that all processes have the same keys. Where an engine steps flat tensors that hold several
    parameters, keys begin with a parameter's position: ``"3.basis"``.

    A constructor's arguments are its group keys: it passes ``locals()`` on.
    """

    rule: Rule = ADAM
    subspace_methods: tuple[str, ...] = SUBSPACE_METHODS
    _told_non_finite = False  # a class attribute: torch's __getstate__ keeps no others through pickle

    def __init__(self, params: ParamsT, arguments: Group) -> None:
        defaults = {key: value for key, value in arguments.items() if key not in ("self", "params", "__class__")}
        self.defaults = defaults  # what the checks of groups look at; torch sets it again
        self.check_values(defaults)
        self._members: dict[int, dict[int, ParamRef]] = {}  # by group number and id: what this optimizer was given
        self._layouts: dict[int, list[tuple[ParamRef, ShardRange]]] = {}  # by id of what it is stepped with
        super().__init__(params, defaults)

    # ---- what a method says -------------------------------------------------------------------------------------

    def validate(self, group: Group) -> None:
        """Refuse bad values of the method's own keys. Called for every group, late ones too."""

    def frame(self, shape: tuple[int, int], group: Group) -> ProjectionSide:
        """Which side of an m x n matrix is replaced by r coordinates."""
        return ProjectionSide.of(shape, group["rank"], group["proj_type"])

    def init_state(self, shard: FullShard, group: Group) -> NewState:
        moments = self.moments(shard, group)
        return self.basis_state(shard, group) | moments if has_subspace(shard) else moments

    def moments(self, shard: FullShard, group: Group) -> NewState:
        return self.rule.state(shard.coordinates_shape, shard.state_dtype(group), shard.parameter.device, group)

    def basis_state(self, shard: FullMatrix, group: Group) -> NewState:
        return {"basis": shard.kept(first_columns(shard.frame, shard.parameter.dtype, shard.parameter.device))}

    def columns(self, shard: FullMatrix, group: Group, state: State) -> Tensor:
        """P of one matrix (side x r), from how the state holds it. Collective where each process keeps a part."""
        return shard.collected(state["basis"], shard.frame.basis_shape[0])

    def basis(self, shard: FullMatrix, group: Group, state: State) -> Basis:
        """P of one matrix, as ``direction`` uses it."""
        return Basis(self.columns(shard, group, state), shard.frame)

    def refresh_is_due(self, group: Group, state: State) -> bool:
        """Before the counter moves on: at steps 0, T, 2T, ... of this matrix."""
        return int(state["step"].item()) % int(group["update_proj_gap"]) == 0

    def find_basis(self, shard: FullMatrix, group: Group, state: State) -> Tensor | Solving:
        """The new columns of one matrix at a refresh. Non-finite ones are not taken over."""
        previous = None if state["step"].item() == 0 else self.columns(shard, group, state)
        return self.singular_vectors(shard.grad, previous, shard, group)

    def singular_vectors(
        self, dense: Tensor, previous: Tensor | None, shard: FullMatrix, group: Group
    ) -> Tensor | Solving:
        """The leading singular vectors of a matrix of which ``dense`` is this process's lines."""
        if group["subspace_method"] == "svd":
            return shard.solving(dense, partial(leading_singular_vectors, frame=shard.frame))
        return orthogonal_iteration(shard.own(dense), shard.frame, previous, shard.sum_)

    def store_basis(self, columns: Tensor, usable: Tensor, shard: FullMatrix, group: Group, state: State) -> None:
        """Write new columns into ``state`` where ``usable``, a flag on the device."""
        state["basis"].copy_(torch.where(usable, shard.kept(columns), state["basis"]))

    def refreshed(self, work: list[ParamStep]) -> None:
        """Called once a step for the matrices that got new columns, if there are any."""

    def direction(self, shard: FullMatrix, group: Group, state: State) -> tuple[Tensor | LowRankUpdate, float]:
        """The method's direction for one matrix and the factor on the learning rate."""
        raise NotImplementedError

    def plain_direction(self, shard: FullShard, group: Group, state: State) -> tuple[Tensor | LowRankUpdate, float]:
        return self.rule.direction(shard.grad, state, group)

    def update(self, shard: FullShard, group: Group, state: State) -> None:
        """One parameter moved: by ``direction`` where it has a subspace, else by the plain rule."""
        if has_subspace(shard):
            direction, correction = self.direction(shard, group, state)
        else:
            direction, correction = self.plain_direction(shard, group, state)
        decay = group["lr"] * group["weight_decay"]
        shard.write(direction, group["lr"] * correction, decay, self.rule.decay_first)

    def settle(self, work: list[ParamStep]) -> None:
        """Called once a step when every parameter has moved: what a method does to several of them together."""

    # ---- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; a group that is refused leaves the optimizer as it was."""
        group = dict(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif not isinstance(group["params"], set):  # sets are torch's to refuse
            group["params"] = list(group["params"])
        self._check_group({**self.defaults, **group})
        super().add_param_group(group)
        self._register(self.param_groups[-1])

    def _register(self, group: Group) -> None:
        """Remember the parameters of a group: engines replace them by flat tensors, and drop or reorder groups."""
        begin = sum(map(len, self._members.values()))
        number = group["group_number"] = len(self._members)
        held = group["params"]
        self._members[number] = {id(p): ParamRef(held, i, begin + i, full_shape(p)) for i, p in enumerate(held)}

    def _member(self, p: Tensor, group: Group) -> ParamRef | None:
        """The parameter ``p`` as it was given in ``group``; None for an engine's flat tensor."""
        own = self._members[group["group_number"]].get(id(p))
        if own is not None and own.parameter is p:  # ids of what is gone are given away again
            return own
        return self._taken_over(group)[id(p)] if _is_dtensor(p) else None

    def _taken_over(self, group: Group) -> dict[int, ParamRef]:
        """The members of a group whose parameters were replaced by DTensors, in their order: accelerate splits a model
        (FSDP2) after its optimizer was built."""
        number, held = group["group_number"], group["params"]
        given = list(self._members[number].values())
        if [full_shape(p) for p in held] != [member.shape for member in given]:
            raise UnsupportedLayout(
                f"parameters of shapes {[member.shape for member in given]} were replaced by DTensors of shapes "
                f"{[full_shape(p) for p in held]}; build the optimizer after the model is split"
            )
        now = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) not in now for p in self.state):
            raise UnsupportedLayout(
                "parameters were replaced by DTensors when they had state already; split the model first, then load"
            )
        self._layouts.clear()
        self._members[number] = {
            id(p): ParamRef(held, i, member.position, member.shape)
            for i, (p, member) in enumerate(zip(held, given, strict=True))
        }
        return self._members[number]

    def _check_group(self, group: Group) -> None:
        for key in group.keys() - self.defaults.keys() - FOREIGN_KEYS:
            raise ValueError(f"unknown parameter group key {key!r} = {group[key]!r}; {nearest(key, self.defaults)}")
        self.check_values(group)
        self._check_parameters(group)

    def check_values(self, group: Group) -> None:
        decay = group["weight_decay"]
        require(is_real(decay) and decay >= 0, "weight_decay must be a number >= 0", decay)
        dtype = group.get("state_dtype")
        floating = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
        require(floating, "state_dtype must be a floating point torch.dtype or None", dtype)
        self.rule.check(group)
        if "rank" in self.defaults:
            self._check_subspace(group)
        self.validate(group)

    def _check_subspace(self, group: Group) -> None:
        rank = group["rank"]
        require(rank is None or (is_whole(rank) and rank >= 1), "rank must be a whole number >= 1 or None", rank)
        proj_type = group["proj_type"]
        require(proj_type in PROJ_TYPES, f"proj_type must be one of {', '.join(PROJ_TYPES)}", proj_type)
        if "update_proj_gap" in group:
            gap = group["update_proj_gap"]
            require(is_whole(gap) and gap >= 1, "update_proj_gap must be a whole number >= 1", gap)
        if "scale" in group:
            require(is_real(group["scale"]), "scale must be a finite number", group["scale"])
        if "shard_basis" in group:
            chosen = group["shard_basis"]
            require(chosen is None or isinstance(chosen, bool), "shard_basis must be True, False or None", chosen)
        if "subspace_method" in group:
            method, known = group["subspace_method"], self.subspace_methods
            require(method in known, f"subspace_method must be one of {', '.join(known)}", method)

    def _check_parameters(self, group: Group) -> None:
        parameters = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        tensors = [p for p in parameters if isinstance(p, Tensor)]  # what is not a tensor is torch's to refuse
        require(len({id(p) for p in tensors}) == len(tensors), "params must hold each parameter once", len(tensors))
        for p in tensors:
            require(p.is_floating_point(), "parameters must be real floating point tensors", p.dtype)
            if group.get("rank") is not None:
                self._check_shape(full_shape(p), group)

    def _check_shape(self, shape: tuple[int, ...], group: Group) -> None:
        """Refuse a parameter that a group with a rank cannot hold."""
        if len(shape) != 2:
            raise ValueError(
                f"rank={group['rank']} needs matrices, got a parameter of shape {shape}; "
                "put it into a group without a rank (gracile.optim.param_groups does)"
            )

    # ---- one step, in three phases ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.autocast(self._device_type(), enabled=False):  # a step inside autocast must not round its products
            first = not self.state
            work = self._collect()
            if not (first and self._is_blank(work)):
                self._refresh(work)
                self._update(work)
                self.settle(work)
        return loss

    def _is_blank(self, work: list[ParamStep]) -> bool:
        """Whether a step moves nothing: torch.distributed.checkpoint lets state be made by one without a learning rate
        and with zeros for gradients. Counting it would keep a subspace of nothing until the second refresh."""
        still = all(group["lr"] == 0 for group in self.param_groups)
        return still and not any(shard.norm(shard.grad) for shard, _, _ in work)

    def _device_type(self) -> str:
        return next((p.device.type for group in self.param_groups for p in group["params"]), "cpu")

    def _collect(self) -> list[ParamStep]:
        """Phase 1: state for every trainable parameter, work for those with a gradient."""
        work, room = [], Workspace()
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad and p.grad is None:
                    continue
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} needs dense gradients; build nn.Embedding(sparse=False)")
                for _, shard, state in self.shards_of(p, group, room):
                    if not state:
                        state.update(self.new_state(shard, group))
                    if p.grad is not None:
                        work.append(ParamStep(shard, group, state))
        cut = [shard for shard, _, _ in work if isinstance(shard, MatrixShard)]
        for shard, rows in zip(cut, complete(cut, [shard.gradient for shard in cut]), strict=True):
            shard.completed = rows
        return work

    def stepped_parameters(self) -> Iterator[tuple[Group, list[Tensor]]]:
        """Each group with the tensors that ``step`` sees in it: parameters, or an engine's flat tensors."""
        for group in self.param_groups:
            yield group, group["params"] or flat_tensors(list(self._members[group["group_number"]].values()))

    def shards_of(self, p: Tensor, group: Group, room: Workspace) -> Iterator[tuple[ParamRef, FullShard, State]]:
        """What this process holds of the parameter or flat tensor ``p``, each with its state."""
        own = self._member(p, group)
        by_element = group.get("rank") is None and not self.rule.needs_rows  # in any shape it is what it was
        if own is not None and not _is_dtensor(p) and (tuple(p.shape) == own.shape or by_element):
            yield own, self._whole(p, group, own.position, room), self.state[p]
            return
        flat = _local(p.detach())
        slope = flat if p.grad is None else _local(p.grad)
        for member, piece in self._layout(p, group):
            keys = self.state[p] if member is own else PrefixedState(self.state[p], member.position)
            yield member, self._sliced(piece.of(flat), piece.of(slope), piece, member, group, room), keys

    def _layout(self, p: Tensor, group: Group) -> list[tuple[ParamRef, ShardRange]]:
        own = self._member(p, group)
        if id(p) not in self._layouts:
            members = list(self._members[group["group_number"]].values())
            self._layouts[id(p)] = pieces_of(p, members) if own is None or not _is_dtensor(p) else [(own, rows_of(p))]
        return self._layouts[id(p)]

    def _whole(self, p: Tensor, group: Group, position: int, room: Workspace) -> FullShard:
        if group.get("rank") is None:
            return FullShard(p, position, room)
        return FullMatrix(p, position, room, self.frame((p.shape[0], p.shape[1]), group))

    def _sliced(
        self, p: Tensor, gradient: Tensor, piece: ShardRange, member: ParamRef, group: Group, room: Workspace
    ) -> FullShard:
        if group.get("rank") is None:
            if not self.rule.needs_rows or len(member.shape) < 2:
                return FlatShard(p, gradient, piece, member.position, room)
            if len(member.shape) > 2:
                raise UnsupportedLayout(
                    f"Adafactor factors matrices; a part of a tensor of shape {member.shape} is none"
                )
            return RowShard(p, gradient, piece, member.position, room)
        frame = self.frame((member.shape[0], member.shape[1]), group)
        shard_basis = group.get("shard_basis")
        if shard_basis is None:
            shard_basis = piece.world.size >= MANY
        return MatrixShard(p, gradient, piece, member.position, room, frame, shard_basis)

    def new_state(self, shard: FullShard, group: Group) -> NewState:
        step = torch.zeros((), dtype=torch.float32, device=shard.host)
        return {"step": step} | self.init_state(shard, group)

    def _refresh(self, work: list[ParamStep]) -> None:
        """Phase 2: a new subspace for each matrix whose clock struck (steps 0, T, 2T, ... of that matrix)."""
        due = [
            ParamStep(shard, group, state)
            for shard, group, state in work
            if has_subspace(shard) and self.refresh_is_due(group, state)
        ]
        finite: list[Tensor] = []
        begun: list[tuple[ParamStep, Tensor | Solving]] = []
        for matrix in due:
            begun.append((matrix, self.find_basis(matrix.shard, matrix.group, matrix.state)))
            if len(begun) >= _wave(begun[-1][1]) or matrix is due[-1]:
                finite += self._stored(begun)
                begun.clear()
        if due:
            self.refreshed(due)
        if not finite or self._told_non_finite:
            return
        if not torch.stack([flag.to(finite[0].device) for flag in finite]).all():  # one host read for all matrices
            self._told_non_finite = True
            warnings.warn("a gradient was not finite at a refresh; its matrix keeps its old subspace", stacklevel=5)

    def _stored(self, begun: list[tuple[ParamStep, Tensor | Solving]]) -> Iterator[Tensor]:
        """The new columns of some matrices written; for each, whether they were finite.

        Several processes solve a matrix each before any of them is waited for.
        """
        for _, found in begun:
            if isinstance(found, Solving):
                found.work()
        for matrix, found in begun:
            columns = found.result() if isinstance(found, Solving) else found
            # A non-finite gradient has no singular vectors: keep the old ones, without asking the device.
            usable = torch.isfinite(columns).all()
            self.store_basis(columns, usable, matrix.shard, matrix.group, matrix.state)
            yield usable

    def _update(self, work: list[ParamStep]) -> None:
        """Phase 3: the method's direction for matrices, the plain rule for the rest, and the weights written."""
        for shard, group, state in work:
            state["step"] += 1
            self.update(shard, group, state)

    # ---- state before it exists -------------------------------------------------------------------------------------

    def expected_state(self, parameter: Tensor, group: Group, saved: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        if self._member(parameter, group) is None:
            return None  # an engine's flat tensor: its engine checks
        if _is_dtensor(parameter):
            return self._split_state(parameter, group).expected(saved)
        return self._state_on_meta(parameter, group)

    def held_state(self, parameter: Tensor, group: Group, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not _is_dtensor(parameter):
            return saved
        split = self._split_state(parameter, group)
        return self.settled(split.shard, group, split.held(saved))

    def saved_state(self, parameter: Tensor, group: Group, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not _is_dtensor(parameter):
            return held
        split = self._split_state(parameter, group)
        return split.shared(self.spread(split.shard, group, dict(held)))

    def _split_state(self, parameter: Any, group: Group) -> DTensorState:
        ((member, piece),) = self._layout(parameter, group)
        whole = torch.empty(member.shape, dtype=parameter.dtype, device="meta")

        def on_paper(rank: int) -> NewState:
            seen = piece.on_paper(rank)
            flat = whole.new_empty(seen.numel)
            return self.spread_state(self._sliced(flat, flat, seen, member, group, Workspace()), group)

        flat, world = _local(parameter.detach()), piece.world
        shard = self._sliced(flat, flat, piece, member, group, Workspace())
        own, last = on_paper(world.rank), on_paper(world.size - 1)
        at_large = self.spread_state(self._whole(whole, group, member.position, Workspace()), group)
        return DTensorState(parameter.device_mesh, shard, own, last, at_large)

    def _state_on_meta(self, parameter: Tensor, group: Group, position: int = 0) -> NewState:
        return self.new_state(
            self._whole(torch.empty_like(parameter, device="meta"), group, position, Workspace()), group
        )

    # ---- state between layouts --------------------------------------------------------------------------------------

    def spread_state(self, shard: FullShard, group: Group) -> NewState:
        """New state as it travels from one layout to another: split as the parameter or its coordinates are, so that
        what each process holds can be put together."""
        return self.new_state(shard, group)

    def spread(self, shard: FullShard, group: Group, state: State) -> Mapping[str, Tensor]:
        """``state`` as it travels."""
        return state

    def settled(self, shard: FullShard, group: Group, spread: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The inverse of ``spread``."""
        return spread

    @classmethod
    def state_bytes_for(cls, shape: Sequence[int], dtype: torch.dtype = torch.float32, **keys: Any) -> int:
        """Bytes of state for one parameter of ``shape`` and ``dtype`` under the group keys ``keys``.

        What the first ``step()`` will allocate, to the byte, without allocating it. A ``rank`` holds for matrices.

        Raises:
            ValueError: as the constructor does.
            TypeError: for an unknown key.
        """
        parameter = torch.empty(tuple(shape), dtype=dtype, device="meta", requires_grad=True)
        if parameter.dim() != 2 and "rank" in keys:
            keys = {**keys, "rank": None}
        built = cls.on_paper(parameter, keys)
        return sum(value.nbytes for _, state in built.planned_state() for value in state.values())

    @classmethod
    def on_paper(cls, parameter: Tensor, keys: dict[str, Any]) -> ShardedOptimizer:
        """An optimizer of this class for one parameter on the meta device."""
        return cls([parameter], **keys)

    def planned_state(
        self, cut: Cut | None = None, rank: int = 0, size: int = 1, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[int, NewState]]:
        """What the first ``step()`` will allocate for each parameter, by its position, on the meta device.

        Args:
            cut: one of ``optim.distributed.partition``, where an engine splits parameters; None where they stay whole.
            rank: the process that is asked for, of ``size`` processes.
            dtype: of what the engine gives the optimizer to step, where it is not the parameters' own.
        """
        for group in self.param_groups:
            members = list(self._members[group["group_number"]].values())
            trained = [member for member in members if member.parameter.requires_grad]
            if cut is None:
                for member in trained:
                    yield member.position, self._state_on_meta(member.parameter, group, member.position)
                continue
            for member, piece in cut(trained, rank, size):
                flat = torch.empty(piece.numel, dtype=dtype or member.parameter.dtype, device="meta")
                yield (
                    member.position,
                    self.new_state(self._sliced(flat, flat, piece, member, group, Workspace()), group),
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also reached by unpickling: groups pickled before a key existed get its default."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch puts there, and no constructor of ours takes
        if not hasattr(self, "_members"):  # unpickled: torch keeps nothing but groups, state and defaults
            self._members, self._layouts = {}, {}
            for group in self.param_groups:
                self._register(group)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)


def _wave(found: Tensor | Solving) -> int:
    """How many matrices may be begun before one is waited for."""
    return found.wave if isinstance(found, Solving) else 1


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # importing the class would take long


def _local(tensor: Any) -> Tensor:
    """What this process holds of a tensor that may be a DTensor, flat."""
    local: Tensor = tensor.to_local() if _is_dtensor(tensor) else tensor
    return local.reshape(-1)
