"""The memory of a process, measured while it trains."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType

from ...int8_weight import memory_of
from ...optim.memory import state_by_kind
from ..build.four_bits import scales_of
from ..engines import deepspeed
from .fake_pass import AtPeak, Pass
from .kinds import BUFFERS, FROZEN, GRADIENTS, MASTER, WEIGHTS

# Marks in a profiled step: the forward pass, and the moment when the last gradient is complete.
FORWARD, ALL_GRADIENTS = "gracile: forward", "gracile: all gradients"


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of some tensors, shared ones once; of DTensors, this process's shards."""
    held: dict[int, int] = {}
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    for local in chain.from_iterable(map(memory_of, parts)):
        if local.is_sparse:
            held |= {id(part): part.nbytes for part in (local._values(), local._indices())}
            continue
        storage = local.untyped_storage()
        held[storage._cdata] = storage.nbytes()
    return sum(held.values())


def weights_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """Parameters and buffers by kind; under ZeRO 3 also this process's partitions, of 4 bits also their scales.

    Buffers are with what is frozen, where anything is: an adapter keeps factors there that it does not train.
    """
    found: dict[str, list[Tensor]] = {WEIGHTS: [], FROZEN: []}
    for p in model.parameters():
        parts = [p.ds_tensor] if hasattr(p, "ds_tensor") else []
        found[WEIGHTS if p.requires_grad else FROZEN] += [p, *parts, *scales_of(p)]
    found[FROZEN if found[FROZEN] else WEIGHTS] += model.buffers()
    return {kind: tensors for kind, tensors in found.items() if tensors}


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def layers_of(optimizer: Any) -> list[Any]:
    """An optimizer and those that it wraps, from the outside in: the last is the one that engines were given."""
    found = [optimizer]
    while hasattr(found[-1], "optimizer"):
        found.append(found[-1].optimizer)
    return found


def held(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes by kind that this process holds now: weights, gradients, and the optimizer's state by what it is for.

    Args:
        model: of any layout.
        optimizer: as the script has it; may be wrapped by accelerate or DeepSpeed.
    """
    found = {kind: storage_bytes(tensors) for kind, tensors in weights_of(model).items()}
    found[GRADIENTS] = storage_bytes(gradients_of(model))
    *outer, given = layers_of(optimizer)
    for engine in filter(deepspeed.is_zero, outer):
        found[BUFFERS] = storage_bytes(deepspeed.buckets(engine))
        found[MASTER] = storage_bytes(deepspeed.masters(engine))
        found[GRADIENTS] += storage_bytes(deepspeed.gradients(engine))
    return found | dict(state_by_kind(given))


def around_steps(
    optimizer: Any, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
) -> Callable[[], None]:
    """Call ``before`` and ``after`` around every step of an optimizer, wrapped or not; returns what undoes it.

    DeepSpeed's ZeRO steps the optimizer that it was given several times, when gradients are gone already: there it is
    the step of ZeRO's own optimizer.
    """
    *outer, given = layers_of(optimizer)
    engine = next(filter(deepspeed.is_zero, outer), None)
    if engine is None:
        handles = [given.register_step_pre_hook(lambda *_: before())] if before is not None else []
        handles += [given.register_step_post_hook(lambda *_: after())] if after is not None else []

        def unhook() -> None:
            for handle in handles:
                handle.remove()

        return unhook
    step = engine.step

    def call(*arguments: Any, **keywords: Any) -> Any:
        if before is not None:
            before()
        result = step(*arguments, **keywords)
        if after is not None:
            after()
        return result

    def restore() -> None:
        vars(engine).pop("step", None)

    engine.step = call
    return restore


def peak_memory() -> int:
    """The most this process has held: allocated on the GPU where there is one, else resident in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


class Gradients:
    """A model's gradients when the last of them is complete: engines free them soon after."""

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self.addresses: set[int] = set()
        self._model = model
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._come: set[int] = set()
        self._hooks = [p.register_post_accumulate_grad_hook(self._seen) for p in self._trained]

    def _seen(self, parameter: Tensor) -> None:
        self._come.add(id(parameter))
        if len(self._come) == len(self._trained):
            self._come.clear()
            with torch.profiler.record_function(ALL_GRADIENTS):
                here = gradients_of(self._model)
            self.bytes = max(self.bytes, storage_bytes(here))
            self.addresses = addresses(here)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Allocation(NamedTuple):
    """A piece of memory and its lifetime, in the profiler's nanoseconds."""

    address: int
    size: int
    begin: int
    end: float

    def alive(self, moment: int) -> bool:
        return self.begin <= moment < self.end


def allocations(profiler: torch.profiler.profile, device: torch.device) -> list[Allocation]:
    """Every allocation on ``device`` in a step that was profiled with ``profile_memory=True``."""
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    todo, changes = list(results.experimental_event_tree()), []
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == device.type:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    found, open_ones = [], {}
    for moment, address, size in sorted(changes, key=lambda change: change[0]):
        if size > 0:
            open_ones[address] = (size, moment)
        elif address in open_ones:
            found.append(Allocation(address, *open_ones.pop(address), moment))
    return found + [Allocation(address, *begun, math.inf) for address, begun in open_ones.items()]


def addresses(tensors: Iterable[Tensor]) -> set[int]:
    held = chain.from_iterable(map(memory_of, tensors))
    return {tensor.untyped_storage().data_ptr() for tensor in held if tensor.numel()}


def passed(
    profiler: torch.profiler.profile,
    device: torch.device,
    gradients: AbstractSet[int],
    weights: AbstractSet[int] = frozenset(),
) -> Pass:
    """The last forward and backward pass of a profiled step, as ``fake_pass.FakePass`` predicts it.

    Args:
        gradients: the addresses of the gradients when the last of them was complete.
        weights: the addresses of the weights at the end of the forward pass, in which ZeRO 3 gathers them.
    """
    marks = _marks(profiler)
    begin, length = marks[FORWARD]
    come, _ = marks[ALL_GRADIENTS]
    forward_end = begin + length
    made = [one for one in allocations(profiler, device) if one.begin >= begin]
    activations = {one for one in made if one.alive(forward_end) and one.address not in weights}
    kept = {one for one in made if one.address in gradients and one.alive(come)}

    def alive(moment: int) -> AtPeak:
        here = [one for one in made if one.alive(moment)]
        of = sum(one.size for one in here if one in kept)
        saved = sum(one.size for one in here if one in activations and one not in kept)
        return AtPeak(saved, of, sum(one.size for one in here) - of - saved)

    total, most, moment = 0, 0, begin
    for when, change in sorted([(one.begin, one.size) for one in made] + [(one.end, -one.size) for one in made]):
        total += change
        if total > most and when <= come:
            most, moment = total, int(when)
    return Pass(sum(one.size for one in activations), alive(moment))


def stepped(profiler: torch.profiler.profile, device: torch.device) -> int:
    """The peak of temporary memory once the last gradient was complete: in clipping and the optimizer's step. New state
    does not count, for it is not freed."""
    come, _ = _marks(profiler)[ALL_GRADIENTS]
    made = [one for one in allocations(profiler, device) if one.begin > come and one.end < math.inf]
    total = most = 0
    for _, change in sorted([(one.begin, one.size) for one in made] + [(one.end, -one.size) for one in made]):
        total += change
        most = max(most, total)
    return most


def _marks(profiler: torch.profiler.profile) -> dict[str, tuple[int, int]]:
    """Where the last mark of each name begins, and how long it is."""
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    found = sorted((event.start_ns(), event.duration_ns(), event.name()) for event in results.events())
    return {name: (start, length) for start, length, name in found if name in (FORWARD, ALL_GRADIENTS)}
