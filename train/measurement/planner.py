"""The bytes that each process of a run will need, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...optim.core.optimizer import ShardedOptimizer
from ...optim.distributed import as_one_buffer, each_alone, flat_length
from ...optim.memory import bytes_by_kind, dtype_of_moments, planned_state
from ...optim.released import exchanged_bytes, kept_bytes
from ..build.model import checkpoint_activations
from ..build.trainee import trainee_of
from ..config.arguments import ALL, COORDINATES, NOTHING, AnySettings, RunArguments
from ..config.checks import optimizer_entry
from ..engines.division import Division
from ..errors import BadInput
from .fake_model import on_cpu
from .fake_pass import FakePass, Pass
from .fake_step import step_bytes
from .kinds import ACTIVATIONS, BUFFERS, FROZEN, GRADIENTS, KINDS, MASTER, STATE, STEP, TEMPORARY, WEIGHTS
from .measure import storage_bytes, weights_of

# Limits on what is planned: nothing larger runs, and planning it would take forever.
MOST_EXAMPLES, MOST_TOKENS = 2**24, 2**40
# torch's AdamW keeps moments in the dtype of the weights, the classes here in fp32 at least. The second is torch's with
# moments like theirs: planned to compare with, not to be trained with.
ADAMW, WIDE_ADAMW = "adamw", "adamw, fp32 moments"


@dataclass(frozen=True)
class Plan:
    """Bytes of the process that needs most, by kind.

    ``held`` is the most of each kind, ``at_peak`` its part of the peak of all kinds together, ``offloaded`` what lies
    in the CPU's memory instead. ``moments`` is the dtype of most of the moments, None where there are none.
    """

    held: dict[str, int]
    at_peak: dict[str, int]
    offloaded: dict[str, int]
    moments: torch.dtype | None

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    @property
    def offloaded_bytes(self) -> int:
        return sum(self.offloaded.values())

    @property
    def weights(self) -> int:
        """Those that are trained and those that are not."""
        return self.held[FROZEN] + self.held[WEIGHTS]

    @property
    def weights_and_state(self) -> int:
        """What papers on these methods report as memory."""
        both = (self.held, self.offloaded)
        return sum(held.get(kind, 0) for held in both for kind in (FROZEN, WEIGHTS, *STATE))


class _Fixed(NamedTuple):
    """What does not depend on the batch: bytes by kind, the dtype of most of the moments, and what tells the bytes that
    a step of the optimizer needs for a moment."""

    held: dict[str, int]
    moments: torch.dtype | None
    step: Callable[[], int]


class Planner:
    """Plans of one run with different optimizers, batches and checkpointing.

    Args:
        config: the run's.
        division: how it is split over processes.
        on_cpu: whether the optimizer steps on a CPU, where products have memory of their own; otherwise on a GPU.

    Raises:
        BadInput: for a configuration that no run could start with.
    """

    def __init__(
        self,
        config: AnySettings,
        division: Callable[[RunArguments, int], Division] = Division.of,
        on_cpu: bool = False,
    ) -> None:
        self.trainee = trainee_of(config)
        for key in ("label_smoothing_factor", "use_liger_kernel"):
            if getattr(config.run, key):
                raise BadInput(f"{key} is {getattr(config.run, key)}, which is not planned; leave it out")
        self.config = config
        self.division = division(config.run, self.trainee.hidden_size)
        self.trainee.check_stage(self.division.stage)
        self.steps_on = "cpu" if on_cpu or self.division.offload else "meta"  # as on a GPU, which need not be here
        in_16_bits = config.run.bf16 and self.division.stage > 0  # the engine casts the model, and keeps fp32 masters
        self.dtype = torch.bfloat16 if in_16_bits else self.trainee.dtype
        self.autocast = torch.bfloat16 if config.run.bf16 and not in_16_bits else None
        # each is computed once for the same arguments
        self._model = cache(self._untrained)
        self._fake_pass = cache(self._make_fake_pass)
        self._pass = cache(self._run_fake_pass)
        self._fixed = cache(self._weights_and_state)
        self._kept_by = cache(self._what_is_kept_by)
        self._reduced_gradients = cache(self._count_reduced)

    def plan(self, optimizer: str, micro_batch: int, checkpointing: bool, tokens: int | None = None) -> Plan:
        """What the run needs with ``optimizer`` (a name of the registry, or ``WIDE_ADAMW``), ``micro_batch`` examples a
        pass of ``tokens`` each, by default as many as a block has, and activations checkpointed or not.

        Raises:
            BadInput: for an optimizer that is unknown or refuses its keys.
        """
        variant = self.trainee.variant(_trained_as(optimizer))
        model, (state, moments, taken) = self._model(variant), self._fixed(optimizer)
        step = taken()
        fixed = dict(state)
        keep = self._kept_by(optimizer)
        size = micro_batch, tokens or self.config.data.block_size
        one = self._pass(size, checkpointing, variant, keep == NOTHING)
        kept = one.gradients
        if self.division.stage >= 2:  # DeepSpeed averages in fp32, unless its configuration says bf16
            width = self.dtype.itemsize if self.config.run.bf16 else 4
            kept = width * self.division.part(_count(model, trained=True), from_stage=2)
        offloaded = {}
        if self.division.offload:
            offloaded = {kind: fixed.pop(kind) for kind in (MASTER, *STATE) if kind in fixed}
            offloaded[GRADIENTS] = 4 * self.division.part(_count(model, trained=True), from_stage=1)
            offloaded[STEP], step = step, 0
            kept = 0 if self.division.stage >= 2 else kept
        # Partitions, and gradients of earlier passes, exist throughout; else gradients grow as activations are freed.
        throughout = self.division.stage >= 2 or self._accumulates
        moment = one.at_peak
        passing = {ACTIVATIONS: moment.activations, TEMPORARY: moment.temporary}
        held = fixed | passing | {GRADIENTS: kept, ACTIVATIONS: one.activations, STEP: step}
        in_the_pass = fixed | passing | {GRADIENTS: kept if throughout else moment.gradients}
        in_the_step = fixed | {GRADIENTS: kept, STEP: step}
        if keep != ALL:  # a subspace may be found, or a parameter move, when most is there
            in_the_pass[STEP] = step
        if keep == COORDINATES:  # and the largest gradient, which is being reduced
            kept = self._reduced_gradients(optimizer)
            largest = max((p.nbytes for p in model.parameters() if p.requires_grad), default=0)
            held[GRADIENTS] = in_the_pass[GRADIENTS] = kept + largest
            in_the_step[GRADIENTS] = kept
        at_peak = max(in_the_pass, in_the_step, key=lambda held: sum(held.values()))
        held, at_peak, offloaded = ({kind: part.get(kind, 0) for kind in KINDS} for part in (held, at_peak, offloaded))
        return Plan(held, at_peak, offloaded, moments)

    def weights_and_state(self, optimizer: str) -> int:
        """Bytes of weights and optimizer state of a process, without a pass: what papers print."""
        fixed = self._fixed(optimizer).held
        return sum(fixed.get(kind, 0) for kind in (FROZEN, WEIGHTS, *STATE))

    def largest_micro_batch(self, optimizer: str, checkpointing: bool, budget: int) -> int:
        """The most examples of a pass with which a process stays within ``budget`` bytes; 0 if one is too many."""

        def peak(batch: int) -> int:
            return self.plan(optimizer, batch, checkpointing).peak

        if peak(1) > budget:
            return 0
        fits, fails = 1, 2
        while peak(fails) <= budget and fails < MOST_EXAMPLES:
            fits, fails = fails, 2 * fails
        while fails - fits > 1:  # the peak is convex and nearly linear: a batch under the chord fits
            rise = (peak(fails) - peak(fits)) / (fails - fits)
            guess = min(fails - 1, fits + max(1, int((budget - peak(fits)) / rise)))
            fits, fails = (guess, fails) if peak(guess) <= budget else (fits, guess)
        return fits

    @property
    def parameters(self) -> int:
        """Of the model, adapters left out."""
        return self.trainee.parameters(self._own_model)

    @property
    def trained(self) -> int:
        """How many numbers of the model, or of its adapter, have gradients."""
        return _count(self._own_model, trained=True)

    # ---- parts ------------------------------------------------------------------------------------------------------

    @property
    def _accumulates(self) -> bool:
        return self.config.run.gradient_accumulation_steps > 1

    def _what_is_kept_by(self, optimizer: str) -> str:
        """What is kept of gradients with an optimizer: all, where it can do no other, or comes to that in some step."""
        keep = self._told_to_keep(optimizer)
        if keep != COORDINATES:
            return keep
        trained = _nbytes(self._model(self.trainee.variant(optimizer)), trained=True)
        return keep if self._reduced_gradients(optimizer) < trained else ALL

    def _told_to_keep(self, optimizer: str) -> str:
        keep, kind = self.config.optimizer.keep_gradients, optimizer_entry(_trained_as(optimizer)).cls
        able = issubclass(kind, ShardedOptimizer) and (keep == NOTHING or kind.keeps_coordinates)
        return keep if able else ALL

    def _count_reduced(self, optimizer: str) -> int:
        model = self._model(self.trainee.variant(optimizer))
        passes = None if self._accumulates else 1
        return kept_bytes(self.trainee.optimizer(model, optimizer), COORDINATES, passes)

    @property
    def _own_model(self) -> PreTrainedModel:
        return self._model(self.trainee.variant(self.config.optimizer.optimizer))

    def _untrained(self, variant: str | None) -> PreTrainedModel:
        return self.trainee.model(variant, self.dtype)

    def _make_fake_pass(self, checkpointing: bool, variant: str | None, freed: bool = False) -> FakePass:
        model = self._untrained(variant)
        model.config.use_cache = self.config.run.use_cache  # as the Trainer does
        if checkpointing:
            checkpoint_activations(model, self.config.run)
        return FakePass(
            lambda: on_cpu(model.train()),
            self.trainee.batch,
            autocast=self.autocast,
            accumulated=self._accumulates,
            freed=freed,
        )

    def _run_fake_pass(
        self, batch: tuple[int, int], checkpointing: bool, variant: str | None, freed: bool = False
    ) -> Pass:
        if batch[0] * batch[1] > MOST_TOKENS:
            raise BadInput(f"a pass over {batch[0]} x {batch[1]} tokens is too large to be planned")
        try:
            return self._fake_pass(checkpointing, variant, freed).of(batch)
        except (AssertionError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise BadInput(
                f"model {self.config.model.model!r} cannot pass {batch[0]} x {batch[1]} tokens: {reason}"
            ) from None

    def _weights_and_state(self, optimizer: str) -> _Fixed:
        variant = self.trainee.variant(_trained_as(optimizer))
        model = self._model(variant)
        stepped = model
        if optimizer == WIDE_ADAMW:
            stepped = self._untrained(variant)
            for p in stepped.parameters():
                p.data = p.data.float() if p.requires_grad else p.data
        state, moments, step = self._state(stepped, _trained_as(optimizer))
        held = self._weights(model)
        keep = self._told_to_keep(optimizer)
        if self.division.stage == 0 and self.division.processes > 1 and keep != ALL:
            held[BUFFERS] = exchanged_bytes(model, self.trainee.optimizer(model, optimizer), keep)
        return _Fixed(held | state, moments, step)

    def _weights(self, model: nn.Module) -> dict[str, int]:
        held = {kind: storage_bytes(tensors) for kind, tensors in weights_of(model).items()}
        if self.division.stage == 3:
            for kind, tensors in weights_of(model).items():
                held[kind] = sum(self._split(tensor) for tensor in tensors)
        return held | {BUFFERS: self._communication(model)}

    def _split(self, tensor: Tensor) -> int:
        """Bytes of it under ZeRO 3: of a small parameter, its part beside the whole; buffers are not split."""
        if not isinstance(tensor, nn.Parameter):
            return tensor.nbytes
        count, division = tensor.numel(), self.division
        whole = count if count <= division.persistence_threshold and division.processes > 1 else 0
        return tensor.element_size() * (division.part(count, 3) + whole)

    def _communication(self, model: nn.Module) -> int:
        """DeepSpeed's buckets of gradients and gathered weights, or DistributedDataParallel's buckets."""
        division = self.division
        if division.stage == 0:
            return _nbytes(model, trained=True) if division.processes > 1 else 0
        width = next(p.element_size() for p in model.parameters() if p.requires_grad)
        if division.stage < 3:
            return width * division.reduce_bucket * (2 if division.overlap else 1)
        split = [p.numel() for p in model.parameters() if p.numel() > division.persistence_threshold]
        gathered = min(sum(split), division.prefetch_bucket + max(split, default=0))
        return width * (division.reduce_bucket + gathered)

    def _state(self, model: nn.Module, optimizer: str) -> _Fixed:
        """Of the optimizer alone."""
        built = self.trainee.optimizer(model, optimizer)
        division = self.division
        if division.stage == 0:
            held = planned_state(built)
            step = cache(partial(step_bytes, built, device=self.steps_on, early=self._kept_by(optimizer) == NOTHING))
            return _Fixed(dict(bytes_by_kind(held)), dtype_of_moments(held), step)
        cut = each_alone if division.stage == 3 else as_one_buffer
        count = division.processes
        processes = sorted({0, count - 1, count // 2})  # one of these holds the most
        plans = {index: planned_state(built, cut, index, count, torch.float32) for index in processes}
        most = max(processes, key=lambda index: bytes_by_kind(plans[index]).total())
        shapes = [[tuple(p.shape) for p in group["params"] if p.requires_grad] for group in built.param_groups]
        master = 4 * sum(flat_length(cut, group, division.processes) for group in shapes)
        step = cache(partial(step_bytes, built, cut, most, count, torch.float32, self.steps_on))
        return _Fixed(dict(bytes_by_kind(plans[most])) | {MASTER: master}, dtype_of_moments(plans[most]), step)


def _trained_as(optimizer: str) -> str:
    return ADAMW if optimizer == WIDE_ADAMW else optimizer


def _count(model: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def _nbytes(model: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)
