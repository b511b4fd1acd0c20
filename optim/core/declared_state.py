"""State that follows from its declaration: what this process holds of each parameter, and the tensors that go with it.

A method declares its tensors (``state_specs``); from the list follow their birth, what fits at loading, DTensors under
FSDP2, what a plan counts, and how they travel between layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...int8_weight import Int8Weight, without_values
from ..distributed import (
    Cut,
    Experts,
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
    Workspace,
    is_dtensor,
    local_flat,
)
from ..state.dtensor_state import DTensorState
from ..state.experts import ExpertStates, specs_of_experts
from ..state.loading import FaithfulLoading
from ..state.spec import (
    PLAIN,
    Codec,
    Coordinates,
    HeldTensor,
    StateSpec,
    from_portable,
    from_saved,
    held_tensors,
    moment_dtype,
    new_state,
    step_spec,
    to_saved,
)
from .group_checks import MATRIX_KEYS
from .rounding import is_rounded
from .rules import ADAM, Rule
from .types import Group, State

ABOUT_PARTS = (  # in the checkpoint of an engine, for who opens it
    "This process's parts of each parameter's state, by its position, in flat tensors. For another number of processes "
    "or another stage save gracile.optim.full_state; DeepSpeed's ds_to_universal cannot convert them."
)


class DeclaredState(FaithfulLoading):
    """An optimizer whose state follows from what its method declares.

    Attributes:
        rule: what moves coordinates.
        matrix_key: the key that marks a group of the matrices that the method is for; None where it has no such groups.
        moment_codec: how the rule's moments are stored.
        registry: the parameters that the optimizer was given.
    """

    rule: Rule = ADAM
    matrix_key: ClassVar[str | None] = None
    moment_codec: ClassVar[Codec] = PLAIN
    registry: ParamRegistry
    _key_names: dict[int, tuple[str, ...]]  # by position, the keys of a parameter's state
    _moments: dict[int, list[StateSpec]]  # by position, its moments: declared once, where every step asks
    _by_chance: dict[int, list[StateSpec]]  # by position, what is rounded by chance, likewise
    _of_experts: dict[int, ExpertStates]  # by position, how a tensor of experts holds the state of each

    # ---- what a method declares -------------------------------------------------------------------------------------

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

    def needs_rows(self, group: Group) -> bool:
        """Whether a part of a matrix must come in whole rows: then ``shard.mean`` is that of all of a row or column."""
        return self.rule.needs_rows

    def moves_by_element(self, shard: FullShard, group: Group) -> bool:
        """Whether each element of a parameter moves by itself, by the plain rule."""
        return not self.is_for_matrices(group) and not self.rule.needs_rows

    def moves_by_direction(self, shard: FullShard, group: Group) -> bool:
        """Whether ``direction`` is all that moves a parameter, and may be asked for many before any of them moves."""
        return self.moves_by_element(shard, group)

    def moves_by_rule(self, shard: FullShard, group: Group) -> bool:
        """Whether a parameter goes where the rule says and no other way."""
        return self.moves_by_element(shard, group)

    def state_specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        """The tensors of a parameter's state beside ``step``, declared for the whole parameter: of the shard, only
        ``shape``, ``side``, ``dtype`` and ``position`` count."""
        return self.moment_specs(shard, group)

    def moment_specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        """The rule's moments."""
        coordinates = Coordinates.of(shard, self.needs_rows(group))
        specs = self.rule.specs(coordinates, moment_dtype(shard, group), group)
        return [spec.stored_by(self.moment_codec) for spec in specs]

    def stored_moments(self, shard: FullShard, group: Group) -> list[StateSpec]:
        """``moment_specs``, declared once a parameter."""
        if shard.position not in self._moments:
            self._moments[shard.position] = self.moment_specs(shard, group)
        return self._moments[shard.position]

    def by_chance(self, shard: FullShard, group: Group) -> list[StateSpec]:
        """The tensors that stochastic rounding is for, declared once a parameter."""
        if shard.position not in self._by_chance:
            self._by_chance[shard.position] = [spec for spec in self.state_specs(shard, group) if is_rounded(spec)]
        return self._by_chance[shard.position]

    def initialize(self, shard: FullShard, group: Group, state: State) -> None:
        """Give new state values that no fill says. Called once for each parameter, in their order. Collective."""

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
            shard = self.shard_on(held.of(flat), held.of(grad), held, ref, group, workspace)
            yield ref, shard, self.state[p] if ref is own else self._prefixed(self.state[p], shard, group)

    def _ref(self, p: Tensor, group: Group) -> ParamRef | None:
        """The parameter ``p`` as it was given; None for an engine's flat tensor."""
        own = self.registry.find(p, group)
        if own is None and is_dtensor(p):
            return self.registry.take_over(p, group, self.param_groups, self.state)
        return own

    def _is_by_element(self, ref: ParamRef, group: Group) -> bool:
        """Whether a parameter in any shape is what it was."""
        return self._side(ref.shape, group) is None and not self.needs_rows(group)

    def _full_shard(self, p: Tensor, group: Group, position: int, workspace: Workspace) -> FullShard:
        side = self._side(tuple(p.shape), group)
        if side is None:
            return FullShard(p, position, workspace)
        if p.dim() > 2:
            return Experts(p, None, position, workspace, side)
        return FullMatrix(p, position, workspace, side)

    def shard_on(
        self, p: Tensor, grad: Tensor, held: ShardRange, ref: ParamRef, group: Group, workspace: Workspace | None = None
    ) -> FullShard:
        """The part ``held`` of a parameter, by its weights ``p`` and its gradient ``grad``, both flat."""
        workspace = workspace or Workspace()
        side, shared = self._side(ref.shape, group), group.get("shard_basis")
        if side is not None and len(ref.shape) > 2:
            return Experts(p, grad, ref.position, workspace, side, held, shared)
        if side is not None:
            return MatrixShard(p, grad, held, ref.position, workspace, side, shared)
        if not self.needs_rows(group) or len(ref.shape) < 2:
            return FlatShard(p, grad, held, ref.position, workspace)
        if len(ref.shape) > 2:
            raise UnsupportedLayout(f"Adafactor factors matrices; a part of a tensor of shape {ref.shape} is none")
        return RowShard(p, grad, held, ref.position, workspace)

    def _side(self, shape: tuple[int, ...], group: Group) -> ProjectionSide | None:
        """Of a matrix, or of each of the matrices that a tensor of experts (E, m, n) is."""
        if not self.is_for_matrices(group) or len(shape) not in (2, 3):
            return None
        return self.projection_side((shape[-2], shape[-1]), group)

    def matrices_of(self, shard: FullShard, group: Group, state: State) -> list[tuple[FullShard, State]]:
        """What a step moves: a parameter, or each expert of it that this process has something to do with."""
        if not isinstance(shard, Experts):
            return [(shard, state)]
        if shard.position not in self._of_experts:
            self._of_experts[shard.position] = ExpertStates(shard, self.specs(shard, group))
        states = self._of_experts[shard.position].states_of(state)
        return [(part, its) for (_, part), its in zip(shard.parts, states, strict=True)]

    def _prefixed(self, held: dict[str, Tensor], shard: FullShard, group: Group) -> PrefixedState:
        names = self._key_names.get(shard.position)
        if names is None:
            names = tuple(own.name for own in held_tensors(self.specs(shard, group), shard))
            self._key_names[shard.position] = names
        return PrefixedState(held, shard.position, names)

    # ---- state, from its declaration --------------------------------------------------------------------------------

    def specs(self, shard: FullShard, group: Group) -> list[StateSpec]:
        """All tensors of a parameter's state."""
        if isinstance(shard, Experts):
            return [step_spec(group), *specs_of_experts(shard, lambda one: self.state_specs(one, group))]
        return [step_spec(group), *self.state_specs(shard, group)]

    def _new_state(self, shard: FullShard, group: Group) -> dict[str, Tensor]:
        state = new_state(self.specs(shard, group), shard)
        for one, its in self.matrices_of(shard, group, state) if 0 not in shard.shape else []:
            self.initialize(one, group, its)
        return state

    def on_meta(
        self, ref: ParamRef, group: Group, device: str = "meta", workspace: Workspace | None = None
    ) -> FullShard:
        """The whole of a parameter, by default without its memory, for shapes alone."""
        like = ref.parameter
        if isinstance(like, Int8Weight):
            whole: Tensor = without_values(ref.shape, like.dtype, device, like.group_size)
        else:
            whole = torch.empty(ref.shape, dtype=like.dtype, device=device)
        return self._full_shard(whole, group, ref.position, workspace or Workspace())

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
        """The state that this process holds, from its portable form, for ``state`` to have. Collective."""
        self.forget()
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
        own = self._ref(parameter, group)
        if own is None:
            return saved
        if is_dtensor(parameter):
            return self._dtensor_state(parameter, group).load(saved)
        shard = self.on_meta(own, group)
        return from_saved(self.specs(shard, group), shard, saved)

    def saved_state(self, parameter: Tensor, group: Group, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        own = self._ref(parameter, group)
        if own is None:
            return held
        if is_dtensor(parameter):
            saved: Mapping[str, Tensor] = self._dtensor_state(parameter, group).save(held)
        else:
            shard = self.on_meta(own, group)
            saved = to_saved(self.specs(shard, group), shard, held)
        # torch.distributed.checkpoint wants full states on one device, but for single numbers
        return {key: value.to(parameter.device) if value.dim() else value for key, value in saved.items()}

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
        shard = self.shard_on(flat, flat, held, ref, group)
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
        """What the first ``step()`` will allocate for each parameter, by its position. As ``planned_shards``."""
        for shard, group in self.planned_shards(cut, index, size, dtype):
            yield shard.position, held_tensors(self.specs(shard, group), shard)

    def planned_shards(
        self,
        cut: Cut | None = None,
        index: int = 0,
        size: int = 1,
        dtype: torch.dtype | None = None,
        device: str = "meta",
    ) -> Iterator[tuple[FullShard, Group]]:
        """What a process will hold of each trainable parameter, with its group: by shape, with anything for weights.

        Args:
            cut: one of ``optim.distributed.partition``, where an engine splits parameters; None where they stay whole.
            index: the process that is asked for, of ``size`` processes.
            dtype: of what the engine gives the optimizer to step, where it is not the parameters' own.
            device: where weights are.
        """
        workspace = Workspace()
        for group in self.param_groups:
            trained = [ref for ref in self.registry.of_group(group) if ref.parameter.requires_grad]
            if cut is None:
                yield from ((self.on_meta(ref, group, device, workspace), group) for ref in trained)
                continue
            for ref, held in cut(trained, index, size):
                flat = torch.empty(held.numel, dtype=dtype or ref.parameter.dtype, device=device)
                yield self.shard_on(flat, flat, held, ref, group, workspace), group

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        if any(self._ref(p, group) is None for group in self.param_groups for p in group["params"]):
            saved["about"] = ABOUT_PARTS
        return saved

    def forget(self) -> None:
        super().forget()
        self._key_names.clear()  # a loaded rank may have other keys and shapes
        self._moments.clear()
        self._by_chance.clear()
        self._of_experts.clear()
