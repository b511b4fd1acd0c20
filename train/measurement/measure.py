"""The memory of a process, measured while it trains."""

from __future__ import annotations

import math
import resource
import sys
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType

from ...int8_weight import memory_of
from ...optim.core.freed_gradient import is_freed
from ...optim.core.optimizer import EARLY, ShardedOptimizer
from ...optim.core.projected_gradient import ProjectedGradient, local_of
from ...optim.memory import state_by_kind
from ..build.four_bits import scales_of
from ..engines import deepspeed
from .fake_pass import AtPeak, Pass
from .kinds import BUFFERS, FROZEN, GRADIENTS, MASTER, WEIGHTS

# Marks in a profiled step: the forward pass, the moment when the last gradient is complete, and the times in which an
# optimizer uses a gradient that is freed in the pass.
FORWARD, ALL_GRADIENTS, USED = "gracile: forward", "gracile: all gradients", "gracile: a gradient is used"


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
    """Gradients, and what is kept of those that were reduced."""
    found: list[Tensor] = []
    for p in model.parameters():
        own = local_of(p.grad)
        found += own.kept if isinstance(own, ProjectedGradient) else [] if own is None or is_freed(own) else [own]
    return found


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


class FreedGradients:
    """Of gradients that are freed in backward passes (``release_gradients``), which are alive at the same time.

    ``bytes`` is the most; ``used`` has, for each time that one was there, the addresses of all that were.
    """

    def __init__(self, model: nn.Module, optimizer: ShardedOptimizer) -> None:
        self.bytes, self.used = 0, list[set[int]]()
        self._model, self._optimizer, self._before = model, optimizer, optimizer.phase_listener
        optimizer.phase_listener = self._listen
        trained = [p for p in model.parameters() if p.requires_grad]
        self._hooks = [p.register_hook(partial(self._come, p)) for p in trained]

    def begin_again(self) -> None:
        self.bytes, self.used = 0, []

    def close(self) -> None:
        self._optimizer.phase_listener = self._before
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def _listen(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            if name == EARLY:
                self._count(gradients_of(self._model))
                stack.enter_context(torch.profiler.record_function(USED))
            if self._before is not None:
                stack.enter_context(self._before(name))
            yield

    def _come(self, parameter: Tensor, gradient: Tensor) -> None:
        """Of a later pass, which is reduced as it is added to what is kept."""
        if isinstance(local_of(parameter.grad), ProjectedGradient):
            self._count([*gradients_of(self._model), gradient])
            with torch.profiler.record_function(USED):
                pass

    def _count(self, here: list[Tensor]) -> None:
        self.bytes = max(self.bytes, storage_bytes(here))
        self.used.append(addresses(here))


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
    used: Sequence[AbstractSet[int]] = (),
) -> Pass:
    """The last forward and backward pass of a profiled step, as ``fake_pass.FakePass`` predicts it.

    Args:
        gradients: the addresses of the gradients when the last of them was complete.
        weights: the addresses of the weights at the end of the forward pass, in which ZeRO 3 gathers them.
        used: those of gradients at each time that one was used, of ``FreedGradients``.
    """
    spans = _spans(profiler)
    begin, length = spans[FORWARD][-1]
    come, _ = spans[ALL_GRADIENTS][-1]
    forward_end = begin + length
    made = [one for one in allocations(profiler, device) if one.begin >= begin]
    activations = {one for one in made if one.alive(forward_end) and one.address not in weights}
    kept = {one for one in made if one.address in gradients and one.alive(come)} | _used(spans[USED], made, used)
    of_step = {one for one in made if _is_in(one, spans[USED]) and one not in kept}
    made = [one for one in made if one not in of_step or one.end < math.inf]  # new state is held

    def alive(moment: int) -> AtPeak:
        here = [one for one in made if one.alive(moment)]
        of = sum(one.size for one in here if one in kept)
        saved = sum(one.size for one in here if one in activations and one not in kept)
        step = sum(one.size for one in here if one in of_step)
        return AtPeak(saved, of, sum(one.size for one in here) - of - saved - step, step)

    total, most, moment = 0, 0, begin
    for when, change in sorted([(one.begin, one.size) for one in made] + [(one.end, -one.size) for one in made]):
        total += change
        if total > most and when <= come:
            most, moment = total, int(when)
    return Pass(sum(one.size for one in activations), alive(moment))


def stepped(profiler: torch.profiler.profile, device: torch.device, used: Sequence[AbstractSet[int]] = ()) -> int:
    """The peak of temporary memory once the last gradient was complete, in clipping and the optimizer's step, and of
    what it needs in the pass, where gradients are freed in it. New state does not count, for it is not freed.
    ``used`` as for ``passed``."""
    spans = _spans(profiler)
    come, _ = spans[ALL_GRADIENTS][-1]
    found = [one for one in allocations(profiler, device) if one.end < math.inf]
    gradients = _used(spans[USED], found, used)
    made = [one for one in found if (one.begin > come or _is_in(one, spans[USED])) and one not in gradients]
    total = most = 0
    for _, change in sorted([(one.begin, one.size) for one in made] + [(one.end, -one.size) for one in made]):
        total += change
        most = max(most, total)
    return most


def _spans(profiler: torch.profiler.profile) -> dict[str, list[tuple[int, int]]]:
    """Where each mark of each name begins, and how long it is. Walks through all that was recorded."""
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    found: dict[str, list[tuple[int, int]]] = {FORWARD: [], ALL_GRADIENTS: [], USED: []}
    for event in results.events():
        if event.name() in found:
            found[event.name()].append((event.start_ns(), event.duration_ns()))
    return {name: sorted(spans) for name, spans in found.items()}


def _is_in(one: Allocation, spans: Sequence[tuple[int, int]]) -> bool:
    before = bisect(spans, (one.begin, math.inf))
    return before > 0 and one.begin <= sum(spans[before - 1])


def _used(
    times: Sequence[tuple[int, int]], made: Iterable[Allocation], used: Sequence[AbstractSet[int]]
) -> set[Allocation]:
    """Those that were gradients at one of the ``times`` of ``used``."""
    at: dict[int, list[Allocation]] = {}
    for one in made:
        at.setdefault(one.address, []).append(one)
    pairs = ((begin, at.get(address, [])) for (begin, _), here in zip(times, used, strict=True) for address in here)
    return {one for begin, found in pairs for one in found if one.alive(begin)}
