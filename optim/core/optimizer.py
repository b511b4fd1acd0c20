"""The optimizer that every method is: torch's API, groups, state that follows from its declaration, and a step in
phases over what this process holds of each parameter.

    collect                 what this process holds of each parameter with a gradient; state, if it has none yet
    for some of these:      one at a time, all at once, or as many as are solved on different processes
        find                a new subspace or mask, where one is due
        update              each parameter moved: a direction from the gradient, written by the shard
    after_step              what is done to several parameters together when all have moved

A method says what it is by the public verbs of ``ShardedOptimizer``, and overrides nothing else: ``check_group`` and
``check_shape``, ``state_specs`` and ``initialize``, ``find``, ``direction`` or ``update``, ``after_step``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...validation import Check
from ..distributed import (
    Cut,
    FlatShard,
    FullMatrix,
    FullShard,
    MatrixShard,
    ParamRef,
    ParamRegistry,
    PrefixedState,
    ProjectionSide,
    RowShard,
    ShardRange,
    UnsupportedLayout,
    Update,
    Workspace,
    complete_gradients,
    full_shape,
    is_dtensor,
    local_flat,
)
from ..state.dtensor_state import DTensorState
from ..state.loading import FaithfulLoading
from ..state.spec import (
    PLAIN,
    Codec,
    Coordinates,
    HeldTensor,
    StateSpec,
    from_portable,
    held_tensors,
    moment_dtype,
    new_state,
    step_spec,
    to_portable,
)
from .group_checks import COMMON_CHECKS, MATRIX_KEYS, check_declared, check_keys, check_tensors, parameters_in
from .rules import ADAM, Rule
from .types import Group, ParamStep, State

# Phases of a step, as a listener is told of them.
FIND, UPDATE, AFTER = "find", "update", "after"
PhaseListener = Callable[[str], AbstractContextManager[Any]]


class ShardedOptimizer(FaithfulLoading):
    """Base of all optimizers here. ``rule`` moves coordinates, and the parameters that are no matrices of the method.

    State per parameter, tensors only: ``step`` (fp32 scalar on the CPU) and what ``state_specs`` declares. All of it is
    born at the first ``step()``, for every trainable parameter, so that all processes have the same keys. Where an
    engine steps flat tensors that hold several parameters, keys begin with a parameter's position: ``"3.exp_avg"``.

    A constructor's arguments are its group keys: it passes ``locals()`` on, of which its parameters are taken.

    Attributes:
        rule: what moves coordinates.
        matrix_key: the key that marks a group of the matrices that the method is for; None where it has no such groups.
        checks: a check for each key of the class's own.
        moment_codec: how the rule's moments are stored.
        phase_listener: None, or what is called with the name of each phase and gives a context manager around it; set
            it to see where the time of a step goes. ``find`` comes only where a subspace or a mask is due, also inside
            the other two.
    """

    rule: Rule = ADAM
    matrix_key: ClassVar[str | None] = None
    checks: ClassVar[Mapping[str, Check]] = {}
    moment_codec: ClassVar[Codec] = PLAIN
    phase_listener: PhaseListener | None = None

    def __init__(self, params: ParamsT, arguments: Group) -> None:
        names = inspect.signature(arguments["__class__"].__init__).parameters
        defaults = {key: value for key, value in arguments.items() if key in names and key not in ("self", "params")}
        self.defaults = defaults  # what the checks of groups look at; torch sets it again
        self.registry = ParamRegistry()
        self._key_names: dict[int, tuple[str, ...]] = {}  # by position, the keys of a parameter's state
        self.check_values(defaults)
        super().__init__(params, defaults)

    # ---- what a method says -----------------------------------------------------------------------------------------

    def check_group(self, group: Group) -> None:
        """Refuse values that do not go together. Called for the defaults and every group, late ones too."""

    def check_shape(self, shape: tuple[int, ...], group: Group) -> None:
        """Refuse a parameter that a group of matrices cannot hold."""

    def check_parameters(self, parameters: Sequence[Tensor], group: Group) -> None:
        """Refuse parameters that a group, of matrices or not, cannot hold."""

    def is_for_matrices(self, group: Group) -> bool:
        """Whether a group holds matrices that the method is for; others get the plain rule."""
        return self.matrix_key is not None and group.get(self.matrix_key) is not None

    @classmethod
    def is_matrix(cls, shape: tuple[int, ...]) -> bool:
        """Whether a group of matrices could hold a parameter of ``shape``."""
        return len(shape) == 2

    def projection_side(self, shape: tuple[int, int], group: Group) -> ProjectionSide | None:
        """Which side of a matrix is replaced by coordinates; None where its moments live in its own elements."""
        return None

    def state_specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        """The tensors of a parameter's state beside ``step``, declared for the whole parameter: of the shard, only
        ``shape``, ``side``, ``dtype`` and ``position`` count."""
        return self.moment_specs(shard, group)

    def moment_specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        """The rule's moments."""
        coordinates = Coordinates.of(shard, self.rule.needs_rows)
        specs = self.rule.specs(coordinates, moment_dtype(shard, group), group)
        return [spec.stored_by(self.moment_codec) for spec in specs]

    def initialize(self, shard: FullShard, group: Group, state: State) -> None:
        """Give new state values that no fill says. Called once for each parameter, in their order. Collective."""

    def portions(self, work: list[ParamStep]) -> Iterator[list[ParamStep]]:
        """The parameters of a step in the portions in which they are found for and moved."""
        yield work

    def find(self, work: list[ParamStep]) -> None:
        """Find a subspace or a mask for those of a portion that one is due for, before they move. Collective."""

    def update(self, G: Tensor, shard: FullShard, group: Group, state: State) -> None:
        """Move one parameter of which ``G`` is the gathered gradient. Its counter has counted this step. Collective."""
        with self._dequantized(shard, group, state) as wide:
            direction, correction = self.direction(G, shard, group, wide)
        decay = group["lr"] * group["weight_decay"]
        shard.write(direction, group["lr"] * correction, decay, self.rule.decay_first)

    def direction(self, G: Tensor, shard: FullShard, group: Group, state: State) -> tuple[Update, float]:
        """Where a parameter goes, laid out as ``G``, and the factor on the learning rate. Collective."""
        return self.rule.direction(G, state, group)

    def after_step(self, work: list[ParamStep]) -> None:
        """What is done to several parameters together, when every one has moved. Collective."""

    # ---- groups -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; a group that is refused leaves the optimizer as it was."""
        group = dict(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif not isinstance(group["params"], set):  # sets are torch's to refuse
            group["params"] = list(group["params"])
        self._check_whole_group({**self.defaults, **group})
        super().add_param_group(group)
        self.register(self.param_groups[-1])

    def register(self, group: Group) -> None:
        """Remember the parameters of a group: engines replace them by flat tensors, and drop or reorder groups."""
        self.registry.register(group)

    def _check_whole_group(self, group: Group) -> None:
        check_keys(group, self.defaults)
        self.check_values(group)
        parameters = parameters_in(group)
        check_tensors(parameters)
        if self.is_for_matrices(group):
            for shape in map(full_shape, parameters):
                self.check_shape(shape, group)
        self.check_parameters(parameters, group)

    def check_values(self, group: Group) -> None:
        """Every declared check of this class and its bases, then what goes together."""
        check_declared(group, COMMON_CHECKS)
        self.rule.check(group)
        for kind in reversed(type(self).__mro__):
            check_declared(group, vars(kind).get("checks", {}))
        self.check_group(group)

    # ---- one step, in phases ----------------------------------------------------------------------------------------

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
                self._advance(work)
        return loss

    def _advance(self, work: list[ParamStep]) -> None:
        for portion in self.portions(work):
            self.find(portion)
            with self.phase(UPDATE):
                for item in portion:
                    item.state["step"] += 1
                    self.update(item.take_grad(), item.shard, item.group, item.state)
        with self.phase(AFTER):
            self.after_step(work)

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """A phase of the step, which the listener is told of."""
        return nullcontext() if self.phase_listener is None else self.phase_listener(name)

    def _is_blank(self, work: list[ParamStep]) -> bool:
        """Whether a step moves nothing: torch.distributed.checkpoint lets state be made by one without a learning rate
        and with zeros for gradients. Counting it would keep a subspace of nothing until the second refresh."""
        still = all(group["lr"] == 0 for group in self.param_groups)
        return still and not any(item.shard.norm(item.shard.gather_grad()) for item in work)

    def _device_type(self) -> str:
        return next((p.device.type for group in self.param_groups for p in group["params"]), "cpu")

    def _collect(self) -> list[ParamStep]:
        """State for every trainable parameter, work for those with a gradient."""
        work, workspace = [], Workspace()
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad and p.grad is None:
                    continue
                if p.grad is not None and p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} needs dense gradients; build nn.Embedding(sparse=False)")
                for _, shard, state in self.shards_of(p, group, workspace):
                    if "step" not in state:
                        state.update(self._new_state(shard, group))
                    if p.grad is not None:
                        work.append(ParamStep(shard, group, state))
        complete_gradients([item.shard for item in work if isinstance(item.shard, MatrixShard)])
        return work

    @contextmanager
    def _dequantized(self, shard: FullShard, group: Group, state: State) -> Iterator[State]:
        """``state`` with its moments as numbers; what they have become is quantized at the end. Collective."""
        if self.moment_codec is PLAIN:
            yield state
            return
        specs = self.moment_specs(shard, group)
        moments = to_portable(specs, shard, state)
        wide = {**state, **moments}
        yield wide
        for spec in specs:
            spec.codec.encode(wide.pop(spec.name), spec, shard, state)

    # ---- what this process holds ------------------------------------------------------------------------------------

    def stepped_parameters(self) -> Iterator[tuple[Group, list[Tensor]]]:
        """Each group with the tensors that ``step`` sees in it: parameters, or an engine's flat tensors."""
        for group in self.param_groups:
            yield group, self.registry.stepped_tensors(group)

    def shards_of(
        self, p: Tensor, group: Group, workspace: Workspace | None = None
    ) -> Iterator[tuple[ParamRef, FullShard, State]]:
        """What this process holds of the parameter or flat tensor ``p``, each with its state."""
        workspace = workspace or Workspace()
        own = self._ref(p, group)
        if own is not None and not is_dtensor(p) and (tuple(p.shape) == own.shape or self._is_by_element(own, group)):
            yield own, self._full_shard(p, group, own.position, workspace), self.state[p]
            return
        flat = local_flat(p.detach())
        grad = flat if p.grad is None else local_flat(p.grad)
        for ref, held in self.registry.ranges(p, group, own):
            shard = self._split_shard(held.of(flat), held.of(grad), held, ref, group, workspace)
            yield ref, shard, self.state[p] if ref is own else self._prefixed(self.state[p], shard, group)

    def _ref(self, p: Tensor, group: Group) -> ParamRef | None:
        """The parameter ``p`` as it was given; None for an engine's flat tensor."""
        own = self.registry.find(p, group)
        if own is None and is_dtensor(p):
            return self.registry.take_over(p, group, self.param_groups, self.state)
        return own

    def _is_by_element(self, ref: ParamRef, group: Group) -> bool:
        """Whether a parameter in any shape is what it was."""
        return self._side(ref.shape, group) is None and not self.rule.needs_rows

    def _full_shard(self, p: Tensor, group: Group, position: int, workspace: Workspace) -> FullShard:
        side = self._side(tuple(p.shape), group)
        return FullShard(p, position, workspace) if side is None else FullMatrix(p, position, workspace, side)

    def _split_shard(
        self, p: Tensor, grad: Tensor, held: ShardRange, ref: ParamRef, group: Group, workspace: Workspace
    ) -> FullShard:
        side = self._side(ref.shape, group)
        if side is not None:
            return MatrixShard(p, grad, held, ref.position, workspace, side, group.get("shard_basis"))
        if not self.rule.needs_rows or len(ref.shape) < 2:
            return FlatShard(p, grad, held, ref.position, workspace)
        if len(ref.shape) > 2:
            raise UnsupportedLayout(f"Adafactor factors matrices; a part of a tensor of shape {ref.shape} is none")
        return RowShard(p, grad, held, ref.position, workspace)

    def _side(self, shape: tuple[int, ...], group: Group) -> ProjectionSide | None:
        if not self.is_for_matrices(group) or len(shape) != 2:
            return None
        return self.projection_side((shape[0], shape[1]), group)

    def _prefixed(self, held: dict[str, Tensor], shard: FullShard, group: Group) -> PrefixedState:
        names = self._key_names.get(shard.position)
        if names is None:
            names = tuple(own.name for own in held_tensors(self.specs(shard, group), shard))
            self._key_names[shard.position] = names
        return PrefixedState(held, shard.position, names)

    # ---- state, from its declaration --------------------------------------------------------------------------------

    def specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        """All tensors of a parameter's state."""
        return [step_spec(), *self.state_specs(shard, group)]

    def _new_state(self, shard: FullShard, group: Group) -> dict[str, Tensor]:
        state = new_state(self.specs(shard, group), shard)
        self.initialize(shard, group, state)
        return state

    def on_meta(self, ref: ParamRef, group: Group) -> FullShard:
        """The whole of a parameter without its memory, for shapes alone."""
        dtype = ref.parameter.dtype
        return self._full_shard(torch.empty(ref.shape, dtype=dtype, device="meta"), group, ref.position, Workspace())

    def held_by_position(self) -> dict[int, list[HeldTensor]]:
        """For each parameter that the optimizer was given, by its position, the tensors of its state when it is whole:
        keys, kinds and devices are the same where it is split."""
        return {
            ref.position: held_tensors(self.specs(shard, group), shard)
            for group in self.param_groups
            for ref in self.registry.of_group(group)
            for shard in [self.on_meta(ref, group)]
        }

    def held_parameters(self) -> Iterator[tuple[ParamRef, FullShard, Group, State]]:
        """What this process holds of each trainable parameter, with its state."""
        for group, tensors in self.stepped_parameters():
            for p in tensors:
                if p.requires_grad:
                    for ref, shard, state in self.shards_of(p, group):
                        yield ref, shard, group, state

    def from_portable(self, shard: FullShard, group: Group, portable: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state that this process holds, from its portable form. Collective."""
        return from_portable(self.specs(shard, group), shard, portable)

    def expected_state(
        self, parameter: Tensor, group: Group, saved: Mapping[str, Any]
    ) -> Mapping[str, tuple[int, ...]] | None:
        own = self._ref(parameter, group)
        if own is None:
            return None  # an engine's flat tensor: its engine checks
        if is_dtensor(parameter):
            return self._dtensor_state(parameter, group).expected(saved)
        shard = self.on_meta(own, group)
        accepted = (held for spec in self.specs(shard, group) for held in spec.codec.accept(spec, shard, saved))
        return {held.name: held.shape for held in accepted}

    def loaded_state(self, parameter: Tensor, group: Group, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not is_dtensor(parameter):
            return saved
        return self._dtensor_state(parameter, group).load(saved)

    def saved_state(self, parameter: Tensor, group: Group, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not is_dtensor(parameter):
            return held
        return self._dtensor_state(parameter, group).save(held)

    def host_keys(self, parameter: Tensor, group: Group) -> set[str]:
        own = self._ref(parameter, group)
        if own is not None:
            shard = self.on_meta(own, group)
            return {held.name for held in held_tensors(self.specs(shard, group), shard) if held.on_host}
        held_by = self.held_by_position()
        refs = self.registry.of_group(group)
        return {f"{ref.position}.{held.name}" for ref in refs for held in held_by[ref.position] if held.on_host}

    def _dtensor_state(self, parameter: Any, group: Group) -> DTensorState:
        own = self._ref(parameter, group)
        ((ref, held),) = self.registry.ranges(parameter, group, own)
        flat = local_flat(parameter.detach())
        shard = self._split_shard(flat, flat, held, ref, group, Workspace())
        return DTensorState(parameter.device_mesh, shard, self.specs(shard, group))

    # ---- state before it exists -------------------------------------------------------------------------------------

    @classmethod
    def state_bytes_for(cls, shape: Sequence[int], dtype: torch.dtype = torch.float32, **keys: Any) -> int:
        """Bytes of state for one parameter of ``shape`` and ``dtype`` under the group keys ``keys``.

        What the first ``step()`` will allocate, to the byte, without allocating it. The keys that mark a group of
        matrices hold for matrices.

        Raises:
            ValueError: as the constructor does.
            TypeError: for an unknown key.
        """
        parameter = torch.empty(tuple(shape), dtype=dtype, device="meta", requires_grad=True)
        if not cls.is_matrix(tuple(shape)):
            keys |= {key: None for key in MATRIX_KEYS if key in keys or key == cls.matrix_key}
        built: Any = cls([parameter], **keys)  # whose constructor has the method's own keywords
        return sum(held.nbytes for _, state in built.planned_state() for held in state)

    def planned_state(
        self, cut: Cut | None = None, index: int = 0, size: int = 1, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[int, list[HeldTensor]]]:
        """What the first ``step()`` will allocate for each parameter, by its position.

        Args:
            cut: one of ``optim.distributed.partition``, where an engine splits parameters; None where they stay whole.
            index: the process that is asked for, of ``size`` processes.
            dtype: of what the engine gives the optimizer to step, where it is not the parameters' own.
        """
        for group in self.param_groups:
            trained = [ref for ref in self.registry.of_group(group) if ref.parameter.requires_grad]
            if cut is None:
                shards: Iterable[FullShard] = (self.on_meta(ref, group) for ref in trained)
            else:
                shards = (
                    self._split_shard(flat, flat, held, ref, group, Workspace())
                    for ref, held in cut(trained, index, size)
                    for flat in [torch.empty(held.numel, dtype=dtype or ref.parameter.dtype, device="meta")]
                )
            for shard in shards:
                yield shard.position, held_tensors(self.specs(shard, group), shard)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._key_names.clear()  # a loaded rank may have other keys

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also reached by unpickling: groups pickled before a key existed get its default."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch puts there, and no constructor of ours takes
        if not hasattr(self, "registry"):  # unpickled: torch keeps nothing but groups, state and defaults
            self.registry, self._key_names = ParamRegistry(), {}
            for group in self.param_groups:
                self.register(group)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
