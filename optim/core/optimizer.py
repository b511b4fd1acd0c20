"""The optimizer that every method is: torch's API, groups, state that follows from its declaration, and a step in
phases over what this process holds of each parameter.

    collect                 what this process holds of each parameter with a gradient; state, if it has none yet
    for some of these:      one at a time, all at once, or as many as are solved on different processes
        find                a new subspace or mask, where one is due
        update              each parameter moved: a direction from the gradient, written by the shard
    after_each              what a moved parameter's gradient is still needed for
    after_step              what is done to several parameters together when all have moved

Some may have moved before, each in the backward pass that made its gradient (``move_early``): the last phase is of all.

A method says what it is by the public verbs of ``ShardedOptimizer``, and overrides nothing else: ``check_group`` and
``check_shape``, ``state_specs`` and ``initialize``, ``find``, ``direction`` or ``update``, ``after_each`` and
``after_step``.
"""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...int8_weight import Int8Weight
from ...validation import Check
from ..distributed import (
    FullShard,
    MatrixShard,
    ParamRegistry,
    UnsupportedLayout,
    Workspace,
    at_once,
    complete_gradients,
    full_shape,
    has_subspace,
    pieces_of,
    stack_of,
    wrapped_group,
)
from ..numbers import decay_of
from ..state.spec import PLAIN, Placement, to_portable
from .batches import (
    BY_ITSELF,
    Batch,
    Direction,
    Movable,
    Way,
    batches,
    found_alone,
    found_together,
    is_born_small,
    launches_cost,
    move_in_place,
    numbers_of,
    write_together,
)
from .capture import CapturableStep, count_on_device, numbers_of_group
from .clock import steps_of
from .compiled import Graphs, compiler_in_use, is_traced
from .group_checks import (
    COMMON_CHECKS,
    check_declared,
    check_none_in_8_bits,
    check_rounding,
    check_tensors,
    parameters_in,
)
from .keywords import ACCEPTED, Accepted, check_keys, check_keywords, keyword_names
from .projected_gradient import Kept, ProjectedGradient, local_of
from .rounding import widened, widened_weights
from .rules import Rule, plain
from .rules_8bit import is_for_codes, is_moved_in_place
from .types import Group, OpenStep, ParamGroup, ParamStep, State

# Phases of a step, by the names that a listener gets.
FIND, UPDATE, AFTER = "find", "update", "after"
EARLY = "early"  # in a backward pass: a gradient is there, and is moved by or reduced
# The keys of every class beside its constructor's, with what they are where they are not given.
COMMON_KEYS: Mapping[str, Any] = {
    "maximize": False, "stochastic_rounding": False, "rounding_seed": 0, "capturable": False
}  # fmt: skip
PhaseListener = Callable[[str], AbstractContextManager[Any]]


class ShardedOptimizer(CapturableStep):
    """Base of all optimizers here. ``rule`` moves coordinates, and the parameters that are no matrices of the method.

    State per parameter, tensors only: ``step`` (fp32 scalar on the CPU, or with ``capturable`` where the parameter is)
    and what ``state_specs`` declares. All of it is born at the first ``step()``, for every trainable parameter, so that
    all processes have the same keys. Where an engine steps flat tensors that hold several parameters, keys begin with a
    parameter's position: ``"3.exp_avg"``.

    A constructor's arguments are its group keys: it passes ``locals()`` on, of which its parameters are taken. Its
    ``torch_keywords`` are the keys that every class has (``COMMON_KEYS``), and what ``accepted`` lists.

    Attributes:
        checks: a check for each key of the class's own.
        accepted: keywords and keys of other optimizers, with the values that change nothing.
        renamed: keys by the names that the authors' code has for them.
        rule_of_codes: the rule over moments that are codes in 8 bits, for devices with a kernel for it; or None.
        only_read: keys of state that ``update`` does not write to.
        spends_coordinates: whether ``direction`` does not look at the coordinates of a matrix again, once the rule had
            them, and they are no gradient.
        writes_by_shards: whether ``update`` writes weights by verbs of their shard alone.
        keeps_coordinates: whether a matrix moves by the coordinates of its gradient alone, between refreshes or changes
            of its mask.
        moves_int8_weights: whether parameters may be weights in 8 bits: not where a method reads or writes weights by
            itself.
        together: what of a model must be stepped together, for a message; None where each parameter may be by itself.
        phase_listener: None, or what is called with the name of each phase and returns a context manager for it; set
            it to see where the time of a step goes. ``find`` comes only where a subspace or a mask is due, also inside
            the other two. ``early`` comes in backward passes, from ``release_gradients``, with the others inside.
    """

    checks: ClassVar[Mapping[str, Check]] = {}
    accepted: ClassVar[Mapping[str, Accepted]] = ACCEPTED
    renamed: ClassVar[Mapping[str, str]] = {}
    later_keys: ClassVar[Mapping[str, Any]] = COMMON_KEYS
    together: ClassVar[str | None] = None
    rule_of_codes: ClassVar[Rule | None] = None
    only_read: ClassVar[tuple[str, ...]] = ()
    spends_coordinates: ClassVar[bool] = False
    writes_by_shards: ClassVar[bool] = True
    keeps_coordinates: ClassVar[bool] = False
    moves_int8_weights: ClassVar[bool] = False
    phase_listener: PhaseListener | None = None
    _compiler: Any = None  # torch's callback, of a step that is compiled
    _is_unused = False  # whether the state is one that a blank step made, and nothing was loaded or trained since
    _opened: OpenStep | None = None  # a step in which parameters have moved early
    _elsewhere: Sequence[State] = ()  # of parameters whose experts are all moved by other processes, in this step
    _wrapped_states: dict[Tensor, dict[str, Tensor]] | None = None  # in use since the last step, under a wrapper

    def __init__(self, params: ParamsT, arguments: Group) -> None:
        names = keyword_names(arguments.get("__class__", type(self)))
        defaults = {key: value for key, value in arguments.items() if key in names}
        more = dict(arguments.get("torch_keywords", {}))
        defaults |= {key: more.pop(key, value) for key, value in COMMON_KEYS.items()}
        check_keywords(type(self).__name__, more, defaults, self.accepted)
        self.defaults = defaults  # what the checks of groups look at; torch sets it again
        self.registry, self._graphs = ParamRegistry(), Graphs()
        self._key_names, self._moments, self._by_chance, self._of_experts = {}, {}, {}, {}
        self._check_each(defaults)
        super().__init__(params, defaults)

    # ---- what a method says -----------------------------------------------------------------------------------------

    def check_group(self, group: Group) -> None:
        """Refuse values that do not go together. Called for every group with all of its keys, late ones too."""

    def check_shape(self, shape: tuple[int, ...], group: Group) -> None:
        """Refuse a parameter that a group of matrices cannot hold."""

    def check_parameters(self, parameters: Sequence[Tensor], group: Group) -> None:
        """Refuse parameters that a group, of matrices or not, cannot hold."""

    def portions(self, work: list[ParamStep]) -> Iterator[list[ParamStep]]:
        """The parameters of a step in the portions in which they are found for and moved."""
        yield work

    def find(self, work: list[ParamStep]) -> None:
        """Find a subspace or a mask for those of a portion that one is due for, before they move. Collective."""

    def update(self, G: Tensor, shard: FullShard, group: Group, state: State) -> None:
        """Move one parameter, or a stack of alike matrices, of which ``G`` is the gathered gradient. Its counter has
        counted this step. Collective."""
        rule, kept = self._rule_for(shard, group, state), isinstance(G, ProjectedGradient)
        spend = self.spends_coordinates and has_subspace(shard) and not kept  # which would be a gradient no longer
        with self._dequantized(shard, group, state) if rule is self.rule else nullcontext(state) as wide:
            direction, correction = found_alone(self.direction(G, shard, group, wide), rule, group, shard, spend)
        shard.write(direction, group["lr"] * correction, decay_of(group), self.rule.decay_first)

    def update_each(
        self, gradients: Sequence[Tensor], shards: Sequence[FullShard], group: Group, states: Sequence[State]
    ) -> None:
        """``update`` of several parameters that go where ``direction`` says, by one call of the rule."""
        each = zip(gradients, shards, states, strict=True)
        directions = [self.direction(G, shard, group, state) for G, shard, state in each]
        towards = found_together(directions, self.rule, group, shards[0])
        write_together(shards, towards, group, self.rule.decay_first)

    def direction(self, G: Tensor, shard: FullShard, group: Group, state: State) -> Direction:
        """Where a parameter goes, laid out as ``G``, and the factor on the learning rate. Collective.

        It yields coordinates and their state to the rule, and gets their direction and that factor: with those of other
        parameters at once, where launches cost more than memory does.
        """
        return (yield G, state)

    def stack_numbers(self, item: ParamStep) -> int:
        """How many numbers it makes to ``update`` a matrix as one of a stack of alike ones, B x m x n with state of
        B x the shape of each, or a vector as one of B x 1 x n; 0 where it must be by itself."""
        return 0

    def batch_kind(self, item: ParamStep) -> object:
        """What parameters that move together have in common beside group, clock and dtypes."""
        return None

    def moves_plainly(self, item: ParamStep) -> bool:
        """Whether a parameter goes where the rule says in this step, and no other way."""
        return self.moves_by_rule(item.shard, item.group)

    def moves_in_lots(self, item: ParamStep) -> bool:
        """Whether ``move_lots`` may move a parameter, where launches cost."""
        return False

    def move_lots(self, items: list[ParamStep]) -> None:
        """``update`` of parameters that are alike in group, clock and dtypes."""
        raise NotImplementedError

    def after_each(self, work: list[ParamStep]) -> None:
        """What is done to parameters that have moved, while their gradients are there. Collective."""

    def after_step(self, work: list[ParamStep]) -> None:
        """What is done to several parameters together, when every one has moved; their gradients may be gone.
        Collective."""

    # ---- groups -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; a group that is refused leaves the optimizer as it was."""
        group = self.with_own_names(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif not isinstance(group["params"], set):  # sets are torch's to refuse
            group["params"] = list(group["params"])
        self._check_whole_group({**self.defaults, **group})
        if self.together is not None and wrapped_group(self.registry.groups, parameters_in(group)) is not None:
            raise UnsupportedLayout(
                f"{type(self).__name__} must step {self.together} together, and ZeroRedundancyOptimizer gives each "
                "process some parameters; leave it away, or split the model by FSDP2 or DeepSpeed"
            )
        super().add_param_group(group)
        self.param_groups[-1] = ParamGroup(self.param_groups[-1], self.later_keys)
        self.register(self.param_groups[-1])

    def with_own_names(self, group: Group) -> Group:
        """A group whose keys are called as here."""
        if twice := sorted(theirs for theirs, own in self.renamed.items() if theirs in group and own in group):
            raise ValueError(f"{twice[0]} and {self.renamed[twice[0]]} are one key; give one of them")
        return {self.renamed.get(key, key): value for key, value in group.items()}

    def register(self, group: Group) -> None:
        """Remember the parameters of a group: engines replace them by flat tensors, and drop or reorder groups."""
        of_all = wrapped_group(self.registry.groups, group["params"])
        self.registry.register(group, of_all)
        if of_all is not None:
            self._wrapped_states = {}

    def _check_whole_group(self, group: Group) -> None:
        self.check_keys(group)
        self.check_values(group)
        parameters = parameters_in(group)
        check_tensors(parameters)
        check_rounding(parameters, group)
        if not self.moves_int8_weights:
            check_none_in_8_bits(parameters, type(self).__name__)
        if group["capturable"]:
            self.check_capturable(group)
        if self.is_for_matrices(group):
            for shape in map(full_shape, parameters):
                self.check_shape(shape, group)
        self.check_parameters(parameters, group)

    def check_keys(self, group: Group) -> None:
        """Refuse keys that would be ignored though they mean something."""
        check_keys(group, self.defaults.keys(), self.accepted, _subclasses(ShardedOptimizer))

    def check_values(self, group: Group) -> None:
        """Every declared check of this class and its bases, then what goes together."""
        self._check_each(group)
        self.check_group(group)

    def _check_each(self, group: Group) -> None:
        """Each value by itself. Of defaults no more is asked: a group may have what they lack."""
        check_declared(group, COMMON_CHECKS)
        self.rule.check(group)
        for kind in reversed(type(self).__mro__):
            check_declared(group, vars(kind).get("checks", {}))

    # ---- one step, in phases ----------------------------------------------------------------------------------------

    @torch.no_grad()
    @partial(torch._disable_dynamo, recursive=False)  # this frame alone, which asks whether there is a compiler
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns the closure's loss, if there is a closure."""
        self._compiler = None if compiler_in_use is None else compiler_in_use()
        try:
            return self._step(closure)
        finally:
            self._compiler = None

    @torch._disable_dynamo  # clocks, messages and host reads: a graph would break at each of them
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.autocast(self._device_type(), enabled=False):  # a step inside autocast must not round its products
            first = not self.state
            if first:
                self._warn_without_matrices()
            opened, self._opened = self._opened, None
            moved = [] if opened is None else [item for items in opened.moved.values() for item in items]
            work = self._collect()
            self.check_captured(work)
            self._is_unused = first and self._is_blank(work)
            if not self._is_unused:
                self.advance(work, moved)
            self.note_counts()
        return loss

    def advance(self, work: list[ParamStep], moved: Sequence[ParamStep] = ()) -> None:
        """The phases of a step, for parameters that have state and a gradient, and the last for those too that have
        ``moved`` in it. Collective."""
        self.move(work)
        with self.phase(AFTER):
            self.after_each(work)
            self.after_step(sorted([*moved, *work], key=lambda item: item.shard.position) if moved else work)

    def move(self, work: list[ParamStep]) -> None:
        """The phases that each of some parameters goes through. Collective."""
        count_on_device(work)
        for portion in self.portions(work):
            self.find(portion)
            with self.phase(UPDATE):
                for item in portion:
                    item.state["step"] += 1
                for batch in batches(portion, self._movable):
                    self._update_batch(batch)
        for state in self._elsewhere:
            state["step"] += 1

    @torch.no_grad()
    def move_early(self, parameter: Tensor) -> None:
        """Move one parameter whose gradient is there, in the backward pass that made it: to the bit as ``step`` would,
        which ends the step for all. Its gradient is not needed afterwards. Collective, where it is split."""
        with torch.autocast(parameter.device.type, enabled=False):
            if self._opened is None:
                self._opened = self._open_step()
            opened = self._opened
            self._elsewhere = []
            work = self._work_of(parameter, *opened.groups[parameter], opened.workspace)
            complete_gradients([item.shard for item in work if isinstance(item.shard, MatrixShard)])
            self.move(work)
            with self.phase(AFTER):
                self.after_each(work)
            for item in work:
                item.shard.let_gradient_go()
            opened.moved[parameter] = work

    @torch.no_grad()
    def reduction_of(self, parameter: Tensor, group: Group, refresh: bool) -> Callable[[Tensor], Kept] | None:
        """What the gradient of a parameter may be reduced to before ``step``; None where that wants all of it.
        ``refresh``: what is due of it is found now, for all of the gradient is there."""
        return None

    def reduced_size(self, parameter: Tensor, group: Group) -> int:
        """How many numbers are kept of a gradient by ``reduction_of``."""
        return parameter.numel()

    def kept_together(self, group: Group, one_pass: bool) -> list[list[Tensor]]:
        """Parameters of a group of matrices whose gradients ``reduction_of`` leaves whole in the same steps, of one
        pass or of several."""
        return [list(group["params"])]

    def why_all_is_needed(self, group: Group) -> str | None:
        """Why no step of a group moves by coordinates alone; None where most do."""
        return (
            None if self.keeps_coordinates else f"{type(self).__name__} needs more of a gradient than its coordinates"
        )

    def has_moved_early(self, parameter: Tensor) -> bool:
        """Whether a parameter has moved in a step that is not at its end."""
        return self._opened is not None and parameter in self._opened.moved

    def _open_step(self) -> OpenStep:
        """A step that begins with parameters that move early. State is born for all, as what is found from several
        together wants it."""
        if not self.state:
            self._warn_without_matrices()
        self._take_over_states()  # before states are born
        opened = OpenStep(Workspace(), {}, {})
        for group in self.param_groups:
            numbers = {**self.later_keys, **numbers_of_group(group)}
            for p in group["params"]:
                opened.groups[p] = group, numbers
                if p not in self.state or self._is_unused:
                    self._born(p, group, opened.workspace)
        self._is_unused = False
        return opened

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a step of which parameters have moved in a backward pass that failed is over."""
        self._opened = None
        for group in self.param_groups:
            for p in group["params"]:
                if isinstance(local_of(p.grad), ProjectedGradient):
                    p.grad = None  # the next may be wanted whole
        super().zero_grad(set_to_none)

    def _update_batch(self, found: Batch) -> None:
        batch = Batch([item.with_numbers() for item in found.items], found.way)
        first = batch.items[0]
        if callable(self._compiler) and all(is_traced(self, item) for item in batch.items):
            self._graphs.move(self, batch, self._compiler)
        elif batch.way is Way.IN_PLACE:
            move_in_place(batch.items, self._rule_for(first.shard, first.group, first.state))
        elif batch.way is Way.STACKED:
            self._update_stacked(batch.items)
        elif batch.way is Way.IN_LOTS:
            self.move_lots(batch.items)
        elif len(batch.items) > 1:
            self._update_together(batch.items)
        else:
            self._update_alone(batch.items[0])

    def _update_alone(self, item: ParamStep) -> None:
        for part in self._in_pieces(item):
            G = part.take_grad()
            with self._rounded(part) as state:
                self.update(G, part.shard, part.group, state)

    def _update_together(self, batch: list[ParamStep]) -> None:
        """``update`` of several parameters that are alike, by one call of the rule."""
        gradients, shards, states = zip(*((item.take_grad(), item.shard, item.state) for item in batch), strict=True)
        self.update_each(gradients, shards, batch[0].group, states)

    def _update_stacked(self, batch: list[ParamStep]) -> None:
        """``update`` of alike matrices as of one."""
        shard = stack_of([item.shard for item in batch])
        state = shard.state([item.state for item in batch], self.only_read)
        self.update(shard.stack_gradients([item.take_grad() for item in batch]), shard, batch[0].group, state)
        state.write_back()

    def _movable(self, item: ParamStep, stacks: bool) -> Movable:
        """How a parameter may be moved: with others where launches cost, and its moments and weights are written as
        they are, or, in a stack, through a codec."""
        shard = item.shard
        costly = launches_cost(shard.device)
        if isinstance(shard.held_gradient, ProjectedGradient):  # of which no stack is made
            return BY_ITSELF
        widened = item.group["stochastic_rounding"] or isinstance(shard.parameter, Int8Weight)
        if widened or not (costly or is_born_small(shard)):
            return BY_ITSELF
        numbers = self.stack_numbers(item) if stacks else 0
        if numbers:
            return Movable(Way.STACKED, numbers, self._stack_kind(item))
        if costly and self.moves_in_lots(item):
            return Movable(Way.IN_LOTS, 0, self.batch_kind(item))  # lots have a size of their own
        if self._rule_for(shard, item.group, item.state) is not self.rule:
            return Movable(Way.IN_PLACE) if self._is_code_in_place(item) else BY_ITSELF
        alike = self.moves_by_direction(shard, item.group) or self.moves_plainly(item)
        if not (costly and alike and self.rule.together is not None and self._holds_numbers(item)):
            return BY_ITSELF
        if self._is_in_place(item):
            return Movable(Way.IN_PLACE)
        return Movable(Way.TOGETHER, numbers_of(item), self.batch_kind(item))

    def _holds_numbers(self, item: ParamStep) -> bool:
        """Whether moments are held as the rule sees them."""
        if self.moment_codec is PLAIN:
            return True
        moments = self.stored_moments(item.shard, item.group)
        return all(item.state[spec.name].is_floating_point() for spec in moments)

    def _rule_for(self, shard: FullShard, group: Group, state: State) -> Rule:
        """The rule that moves a parameter: the one for codes, where its moments are such and there is a kernel, which
        takes Python's numbers."""
        if self.rule_of_codes is not None and not group["capturable"] and is_for_codes(shard, state):
            return self.rule_of_codes
        return self.rule

    def _is_code_in_place(self, item: ParamStep) -> bool:
        grad = item.shard.held_gradient
        return self.moves_plainly(item) and grad is not None and is_moved_in_place(item.shard.parameter, grad)

    def _stack_kind(self, item: ParamStep) -> object:
        shard, grad = item.shard, item.shard.held_gradient
        assert grad is not None
        memory = shard.parameter.untyped_storage()._cdata if shard.born_stacked else 0
        side = shard.side if has_subspace(shard) else shard.shape
        return side, grad.dtype, memory, self.batch_kind(item)

    def _is_in_place(self, item: ParamStep) -> bool:
        """Whether a parameter that may be moved with others is moved in no memory of its own."""
        W, grad = item.shard.parameter, item.shard.held_gradient
        assert grad is not None
        held = {(t.dtype, t.stride()) for t in (W, grad, *(t for key, t in item.state.items() if key != "step"))}
        fused = self.rule.in_place is not None and not item.group["capturable"]  # whose eps follows from t
        return len(held) == 1 and fused and self.moves_plainly(item)

    def _in_pieces(self, item: ParamStep) -> Iterator[ParamStep]:
        """A parameter, in pieces where it is large and each element moves by itself: a step's memory is then theirs."""
        size = self.piece_size(item)
        if not size:
            yield item
            return
        for shard, begin, end in pieces_of(item.shard, size):
            if shard is item.shard:
                yield item
            elif begin < end or self.moment_codec is not PLAIN:  # which every process takes part in
                yield ParamStep(shard, item.group, self._state_of_piece(item, begin, end))

    def piece_size(self, item: ParamStep) -> int:
        """How many elements a parameter moves at a time, where each moves by itself; 0 where all move at once."""
        if not self.moves_by_element(item.shard, item.group):
            return 0
        size = at_once(item.shard.device)
        widens = self.moment_codec is not PLAIN or item.group["stochastic_rounding"]
        widens = widens or isinstance(item.shard.parameter, Int8Weight)
        return size // 2 if widens and launches_cost(item.shard.device) else size  # moments beside their direction

    def _state_of_piece(self, item: ParamStep, begin: int, end: int) -> State:
        """What is laid out as the parameter, from an element to another, and all of the rest."""
        shard, state = item.shard, dict(item.state)
        by_element = self.moves_by_element(shard, item.group)
        for spec in self.stored_moments(shard, item.group) if by_element else self.state_specs(shard, item.group):
            if spec.placement is Placement.ELEMENTS:
                state |= spec.codec.piece(spec, shard, item.state, begin, end)
        return state

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """A phase of the step, announced to the listener."""
        return nullcontext() if self.phase_listener is None else self.phase_listener(name)

    def _rounded(self, item: ParamStep) -> AbstractContextManager[State]:
        """The state that a parameter is moved with: itself, or wider, if it is rounded by chance."""
        by_chance, in_8_bits = item.group["stochastic_rounding"], isinstance(item.shard.parameter, Int8Weight)
        if not (by_chance or in_8_bits):
            return nullcontext(item.state)
        specs = self.by_chance(item.shard, item.group) if by_chance else []
        return widened(item.shard, item.state, specs, item.group, self.writes_by_shards)

    def rounded_weights(self, item: ParamStep, what: str) -> AbstractContextManager[None]:
        """Weights that are written outside of ``update``; ``what`` tells the passes of one step apart."""
        if not item.group["stochastic_rounding"]:
            return nullcontext()
        return widened_weights(item.shard, item.state, item.group, what)

    def _is_blank(self, work: list[ParamStep]) -> bool:
        """Whether a step moves nothing: torch.distributed.checkpoint lets state be made by one without a learning rate
        and with zeros for gradients. Counting it would keep a subspace of nothing until the second refresh. State that
        it made is made anew when training begins: of other weights, or after a load that was broken off."""
        still = all(plain(group["lr"]) == 0 for group in self.param_groups)
        return still and not any(item.shard.norm(item.take_grad()) for item in work)

    def _warn_without_matrices(self) -> None:
        """Say once that a method does nothing: plain parameters were given to it, as a Trainer does."""
        if self.matrix_key is None or any(map(self.is_for_matrices, self.param_groups)):
            return
        name = type(self).__name__
        warnings.warn(
            f"{name} was given no group of matrices, with a key {self.matrix_key!r}, and trains all parameters by its "
            f"plain rule; make groups by gracile.optim.param_groups(model, {self.matrix_key}=...), for a Trainer by "
            f"optimizer_cls_and_kwargs=({name}, {{'params': param_groups(...)}})",
            UserWarning,
            stacklevel=8,
        )

    def _device_type(self) -> str:
        return next((p.device.type for group in self.param_groups for p in group["params"]), "cpu")

    def _collect(self) -> list[ParamStep]:
        """State for every trainable parameter, work for those with a gradient."""
        self._take_over_states()
        work: list[ParamStep] = []
        alone: list[ParamStep] = []
        workspace = Workspace()
        self._elsewhere = []
        self.look_at_counters()
        for group in self.param_groups:
            numbers = {**self.later_keys, **numbers_of_group(group)}
            for p in group["params"]:
                for item in self._work_of(p, group, numbers, workspace):
                    (alone if item.shard.alone else work).append(item)
        if self._wrapped_states is not None:
            self._wrapped_states = dict(self.state)
        complete_gradients([item.shard for item in work if isinstance(item.shard, MatrixShard)])
        return work + alone  # in the end, for processes have different ones

    def _work_of(self, p: Tensor, group: Group, numbers: Group, workspace: Workspace) -> list[ParamStep]:
        """State for a parameter, if it is trained, and work if it has a gradient."""
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} needs dense gradients; build nn.Embedding(sparse=False)")
        work = []
        for shard, held in self._born(p, group, workspace):
            state, counter = self.with_host_clock(p, shard, numbers, held)
            if p.grad is None or 0 in shard.shape:
                continue
            parts = self.matrices_of(shard, numbers, state)
            work += [ParamStep(part, numbers, its, counter=counter) for part, its in parts]
            if not parts:
                self._elsewhere = [*self._elsewhere, state]
        return work

    def _born(self, p: Tensor, group: Group, workspace: Workspace) -> list[tuple[FullShard, State]]:
        """What this process holds of a trained parameter, with state, new where there is none."""
        if not p.requires_grad and p.grad is None:
            return []
        found = []
        for _, shard, state in self.shards_of(p, group, workspace):
            shard.maximize = group["maximize"]
            if "step" not in state or (self._is_unused and steps_of(state) == 0):
                state.update(self._new_state(shard, group))
            found.append((shard, state))
        return found

    def _take_over_states(self) -> None:
        """ZeroRedundancyOptimizer puts saved states in the place of ours, where others call ``load_state_dict``."""
        if self._wrapped_states is None:
            return
        owners = [(p, group) for group in self.param_groups for p in group["params"] if p in self.state]
        loaded = [(p, group) for p, group in owners if self.state[p] is not self._wrapped_states.get(p)]
        for p, group in loaded:
            self.state[p] = self.taken_over(p, group, self.state[p])
        if loaded:
            self.forget()

    @contextmanager
    def _dequantized(self, shard: FullShard, group: Group, state: State) -> Iterator[State]:
        """``state`` with its moments as numbers; what they have become is quantized at the end. Collective."""
        if self.moment_codec is PLAIN:
            yield state
            return
        specs = self.stored_moments(shard, group)
        moments = to_portable(specs, shard, state)
        wide: State = ChainMap(moments, state)
        yield wide
        for spec in specs:
            spec.codec.encode(wide.pop(spec.name), spec, shard, state)

    def forget(self) -> None:
        super().forget()
        self._is_unused, self._opened = False, None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also reached by unpickling: groups pickled before a key existed get its default."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # which torch puts there, and no constructor of ours takes
        for key, value in COMMON_KEYS.items():  # pickled before there was one
            self.defaults.setdefault(key, value)
        self.param_groups[:] = [ParamGroup(group, self.later_keys) for group in self.param_groups]
        if not hasattr(self, "registry"):  # unpickled: torch keeps nothing but groups, state and defaults
            self.registry, self._graphs = ParamRegistry(), Graphs()
            self._key_names, self._moments, self._by_chance, self._of_experts = {}, {}, {}, {}
            for group in self.param_groups:
                self.register(group)
        for group in self.param_groups:
            for key in self.defaults.keys() - self.later_keys:
                group.setdefault(key, self.defaults[key])


def _subclasses(kind: type) -> list[type]:
    """All classes below ``kind``."""
    children: list[type] = kind.__subclasses__()
    return [below for child in children for below in (child, *_subclasses(child))]
