"""State that knows no processes: whole tensors by parameter, to resume on more or fewer of them or in another layout.

An engine's own checkpoints are faster and exact to the bit, but hold each process's slices. Here a matrix's lines are
put together again, as the declarations of the state (``state/spec.py``) say that they are split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .core.optimizer import ShardedOptimizer
from .core.types import Group
from .distributed import Experts, FlatShard, FullMatrix, FullShard, MatrixShard, ParamRef, ShardRange
from .low_rank.optimizer import LowRankOptimizer
from .low_rank.published import is_foreign
from .state.blockwise_8bit import without_codes
from .state.experts import ExpertsCodec, ExpertsSpec
from .state.loading import by_position
from .state.spec import Placement, State, StateSpec, portable_from

FORMAT = 1
Held = tuple[ParamRef, FullShard, Group, State]


@torch.no_grad()
def full_state(optimizer: ShardedOptimizer) -> dict[str, Any]:
    """The whole state of ``optimizer``, independent of how it is split over processes, and weights that are split.

    Collective: every process calls it, after the first step. Process 0 of each parameter's group gets the tensors, on
    the CPU; the others an empty mapping. 8-bit moments are given in fp32.

    Args:
        optimizer: of ``gracile.optim``, in one process or split by ZeRO or FSDP2.

    Returns:
        ``format``, ``class``, and in ``parameters`` the state of each parameter by its position among all.

    Example:
        >>> from torch import nn
        >>> from gracile.optim import GaLoreAdamW, full_state, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> saved = full_state(optimizer)
        >>> saved["class"], {key: tuple(tensor.shape) for key, tensor in saved["parameters"][0].items()}
        ('GaLoreAdamW', {'step': (), 'basis': (32, 4), 'exp_avg': (4, 64), 'exp_avg_sq': (4, 64)})
    """
    parameters: dict[int, dict[str, Tensor]] = {}
    for ref, shard, group, state in optimizer.held_parameters():
        whole: dict[str, Tensor | None] = {}
        for spec in optimizer.specs(shard, group):
            if isinstance(spec, ExpertsSpec):
                whole[spec.name] = _of_all_experts(spec, shard, state)
            else:
                whole[spec.name] = _gathered(spec.codec.decode(spec, shard, state), spec, shard)
        held = _range_of(shard)
        if held is not None:
            whole["weight"] = held.gather(shard.parameter, 0)
        if all(value is not None for value in whole.values()):
            parameters[ref.position] = {key: value.cpu() for key, value in whole.items() if value is not None}
    return {"format": FORMAT, "class": type(optimizer).__name__, "parameters": parameters} if parameters else {}


def full_state_of(class_name: str, saved: dict[str, Any]) -> dict[str, Any]:
    """The full state from the ``state_dict()`` of an optimizer of that class that is not split over processes."""
    parameters = {position: without_codes(state) for position, state in saved["state"].items()}
    return {"format": FORMAT, "class": class_name, "parameters": parameters}


@torch.no_grad()
def load_full_state(optimizer: ShardedOptimizer, saved: dict[str, Any]) -> None:
    """Load what ``full_state`` returned into an optimizer of any layout. Every process passes all of it.

    Args:
        optimizer: of the same class and for the same parameters; its layout and number of processes may differ.
        saved: what ``full_state`` returned at process 0; or the ``state_dict()`` of the published class of the same
            name, as ``read_published`` reads it. Groups stay as they are here.

    Raises:
        ValueError: where ``saved`` is of another class or of other parameters; nothing is changed then.

    Example:
        >>> from torch import nn
        >>> from gracile.optim import GaLoreAdamW, full_state, load_full_state
        >>> weight = nn.Parameter(torch.randn(64, 32))
        >>> one, other = (GaLoreAdamW([{"params": [weight], "rank": 4}], lr=0.01) for _ in range(2))
        >>> weight.square().sum().backward()
        >>> one.step()
        >>> load_full_state(other, full_state(one))
        >>> all(torch.equal(tensor, other.state[weight][key]) for key, tensor in one.state[weight].items())
        True
    """
    held = list(optimizer.held_parameters())
    if "param_groups" in saved:
        saved = _of_published(optimizer, saved, held)
    if saved.get("format") != FORMAT or saved.get("class") != type(optimizer).__name__:
        raise ValueError(
            f"the full state is of {saved.get('class')!r} in format {saved.get('format')!r}, expected "
            f"{type(optimizer).__name__!r} in format {FORMAT}"
        )
    fresh = []
    for ref, shard, group, _ in held:
        own = saved["parameters"].get(ref.position)
        if own is None:
            raise ValueError(f"the full state has nothing of parameter {ref.position}, of shape {ref.shape}")
        fresh.append(_own_parts(optimizer, own, ref, shard, group))
    for (ref, shard, group, state), portable in zip(held, fresh, strict=True):
        for key, value in optimizer.from_portable(shard, group, portable).items():
            state[key] = value
        own = saved["parameters"][ref.position]
        if "weight" in own:
            shard.parameter.copy_(_own_weights(own["weight"], shard))


def _of_published(optimizer: ShardedOptimizer, saved: dict[str, Any], held: list[Held]) -> dict[str, Any]:
    """The full state from the ``state_dict()`` of a published class."""
    foreign = all(map(is_foreign, saved["state"].values()))
    if not isinstance(optimizer, LowRankOptimizer) or optimizer.published is None or not foreign:
        raise ValueError(f"a state_dict() of {type(optimizer).__name__} is loaded by load_state_dict; see full_state")
    for group in saved["param_groups"]:
        optimizer.check_keys(optimizer.with_own_names(group))
    states = by_position(saved)
    parameters = {
        ref.position: optimizer.published_state(ref, group, states[ref.position], shard.device)
        for ref, shard, group, _ in held
        if ref.position in states
    }
    return {"format": FORMAT, "class": type(optimizer).__name__, "parameters": parameters}


def _range_of(shard: FullShard) -> ShardRange | None:
    return shard.held if isinstance(shard, (FlatShard, MatrixShard, Experts)) else None


def _of_all_experts(spec: ExpertsSpec, shard: FullShard, state: State) -> Tensor | None:
    """``_gathered`` of each expert, stacked. Collective."""
    assert isinstance(shard, Experts)
    assert isinstance(spec.codec, ExpertsCodec)
    own = spec.codec.decode_each(spec, shard, state)
    here = {e: (value, one, part) for value, one, (e, part) in zip(own, spec.each, shard.parts, strict=True)}
    found = []
    for e in range(shard.shape[0]):
        owner = None if shard.held is None else shard.owner(e)
        if owner is None:
            value, one, part = here[e]
            found.append(_gathered(value, one, part))
        else:  # of one process alone
            sent = here[e][0] if e in here else torch.empty(0, dtype=spec.dtype)
            sizes = [math.prod(spec.one.shape) if i == owner else 0 for i in range(shard.processes.size)]
            received = shard.processes.gather(sent.to(shard.device).contiguous().view(-1), sizes, 0)
            found.append(None if received is None else received.view(spec.one.shape))
    whole = [value for value in found if value is not None]
    return torch.stack(whole) if len(whole) == shard.shape[0] else None


def _gathered(value: Tensor, spec: StateSpec, shard: FullShard) -> Tensor | None:
    """The whole of which ``value`` is this process's part, at process 0; None at the others."""
    if not isinstance(shard, (FlatShard, MatrixShard)):
        return value.clone()
    if spec.placement is Placement.BASIS and isinstance(shard, FullMatrix):
        value = shard.all_gather_rows(value, spec.shape[0])
    if spec.placement is Placement.ELEMENTS:
        return shard.held.gather(value, 0)
    if spec.placement is not Placement.LINES or isinstance(shard, FlatShard):
        return value.clone() if shard.processes.index == 0 else None
    own = shard.own_lines(value.movedim(spec.axis, 0))
    lines = [last - first for first, last in shard.line_ranges]
    line = math.prod(own.shape[1:])
    flat = shard.processes.gather(own.contiguous().view(-1), [count * line for count in lines], 0)
    return None if flat is None else flat.view(sum(lines), *own.shape[1:]).movedim(0, spec.axis).contiguous()


def _own_weights(weight: Tensor, shard: FullShard) -> Tensor:
    held = _range_of(shard)
    if held is None:
        return weight.view(shard.parameter.shape)
    return weight.reshape(-1).narrow(0, held.start, held.numel)


def _own_parts(
    optimizer: ShardedOptimizer, saved: Mapping[str, Tensor], ref: ParamRef, shard: FullShard, group: Group
) -> dict[str, Any]:
    """This process's parts of the state of one parameter, in their portable form: of a tensor of experts, a list."""
    specs = optimizer.specs(shard, group)
    if isinstance(shard, Experts):
        like = optimizer.on_meta(ref, group)
        whole = portable_from(optimizer.specs(like, group), like, saved)
    else:
        like = FullShard(torch.empty(ref.shape, device="meta"), ref.position, shard.workspace)
        whole = portable_from(specs, like, saved)
    parts: dict[str, Any] = {}
    for spec in specs:
        if spec.name not in whole:
            raise ValueError(f"the full state of parameter {ref.position} has no {spec.name!r}; it has {sorted(saved)}")
        value = whole[spec.name]
        if isinstance(spec, ExpertsSpec) and isinstance(shard, Experts):
            each = zip(spec.each, shard.parts, strict=True)
            fits = tuple(value.shape) == spec.shape
            parts[spec.name] = [_laid_out(value[e], one, part) for one, (e, part) in each] if fits else None
        else:
            parts[spec.name] = _laid_out(value, spec, shard)
        if parts[spec.name] is None:
            raise ValueError(
                f"{spec.name!r} of parameter {ref.position} has shape {tuple(value.shape)} in the full "
                f"state, which does not fit a parameter of shape {ref.shape} in this optimizer"
            )
    return parts


def _laid_out(value: Tensor, spec: StateSpec, shard: FullShard) -> Tensor | None:
    """This process's part of ``value`` as it is born; None where it does not fit."""
    own = _own_part(value, spec, shard)
    made = spec.new_portable(shard, shard.host if spec.on_host else shard.device)
    return made.copy_(own) if own.shape == made.shape else None


def _own_part(value: Tensor, spec: StateSpec, shard: FullShard) -> Tensor:
    if isinstance(shard, FlatShard) and spec.placement is Placement.ELEMENTS:
        return value.reshape(-1)[shard.held.start : shard.held.stop]
    if isinstance(shard, MatrixShard) and spec.placement is Placement.LINES:
        first, last = shard.lines
        return value.narrow(spec.axis, first, last - first)
    if isinstance(shard, FullMatrix) and spec.placement is Placement.BASIS:
        return shard.shard_rows(value)
    return value
