"""The layout of a run, which process holds what; and checkpoints made in one layout and resumed in another.

``Layout`` describes a run that exists, or a checkpoint; ``division.Division`` one that is planned.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ...optim.core.optimizer import ShardedOptimizer
from ...optim.full_state import full_state, full_state_of, load_full_state
from ..atomic_write import write_atomically
from ..errors import BadInput
from .deepspeed import settings_of

LAYOUT, FULL_STATE = "layout.json", "full_state.pt"
PLAIN, DEEPSPEED, FSDP = "plain", "deepspeed", "fsdp"  # plain: one process, or DistributedDataParallel's replicas


@dataclass(frozen=True)
class Layout:
    """What decides which process holds which part of an optimizer's state, and how many examples a step takes."""

    engine: str
    processes: int
    settings: dict[str, Any]
    examples_per_step: int

    @classmethod
    def of(cls, run: TrainingArguments) -> Layout:
        engine, settings = PLAIN, {}
        chosen = settings_of(run)
        if chosen is not None:
            engine, settings = DEEPSPEED, _zero_settings(chosen, run)
        elif run.fsdp:
            engine = FSDP
        examples = run.per_device_train_batch_size * run.gradient_accumulation_steps * run.world_size
        return cls(engine, run.world_size, settings, examples)

    def places_state_as(self, other: Layout) -> bool:
        """Whether each process holds the same state in both: then the engine's own checkpoint resumes to the bit."""
        same = (self.engine, self.settings) == (other.engine, other.settings)
        return same and (self.engine == PLAIN or self.processes == other.processes)

    @property
    def stage(self) -> int:
        """Stage of ZeRO; 0 without DeepSpeed."""
        stage: int = self.settings.get("stage", 0)
        return stage

    @property
    def splits_weights(self) -> bool:
        return self.engine == FSDP or self.stage == 3

    @property
    def state_parts(self) -> int:
        """How many processes DeepSpeed splits an optimizer's state over. (FSDP splits the parameters themselves.)"""
        return self.processes if self.stage >= 1 else 1

    @property
    def gradient_parts(self) -> int:
        return self.processes if self.stage >= 2 else 1

    def __str__(self) -> str:
        names = {PLAIN: "", FSDP: "FSDP on ", DEEPSPEED: f"DeepSpeed ZeRO {self.stage} on "}
        return names[self.engine] + count_of(self.processes)


def count_of(processes: int) -> str:
    return f"{processes} process{'es' if processes > 1 else ''}"


def _zero_settings(config: dict[str, Any], run: TrainingArguments) -> dict[str, Any]:
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    bf16 = config.get("bf16", {}).get("enabled", False)
    return {
        "stage": zero.get("stage", 0),
        "offload": offload.get("device", "none"),
        "sub_group_size": zero.get("sub_group_size"),
        "round_robin_gradients": zero.get("round_robin_gradients", False),
        "bf16": run.bf16 if bf16 == "auto" else bf16,
        "data_types": config.get("data_types"),
    }


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def saved(checkpoint: Path) -> Layout | None:
    """The layout that a checkpoint was made in; None if it does not say."""
    try:
        return Layout(**json.loads((checkpoint / LAYOUT).read_text()))
    except FileNotFoundError:
        return None


def save(checkpoint: Path, layout: Layout, optimizer: torch.optim.Optimizer, is_main: bool) -> None:
    """Write, beside an engine's own checkpoint, its layout and the state in a form for any other layout. Collective."""
    if layout.engine != PLAIN and isinstance(optimizer, ShardedOptimizer):
        state = full_state(optimizer)
        if is_main:
            torch.save(state, checkpoint / FULL_STATE)
    if is_main:
        write_atomically(checkpoint / LAYOUT, json.dumps(asdict(layout)))


def needs_resharding(checkpoint: Path, layout: Layout) -> bool:
    """Whether a run in ``layout`` cannot load the checkpoint as its engine saved it.

    Raises:
        BadInput: if it cannot, and the checkpoint has no state for other layouts.
    """
    other = saved(checkpoint)
    if other is None or layout.places_state_as(other):
        return False
    found = [checkpoint / FULL_STATE] if other.engine != PLAIN else [checkpoint / "optimizer.pt"]
    saved_weights = (*checkpoint.glob("model*.safetensors"), *checkpoint.glob("adapter_model.safetensors"))
    found += [next(iter(saved_weights), checkpoint / "model.safetensors")]
    for file in found:
        if not file.is_file():
            raise BadInput(
                f"{checkpoint} was made by {other} and has no {file.name}, so it cannot go on as {layout}; resume it "
                f"as {other}"
            )
    return True


def load_resharded(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Give ``optimizer``, in its present layout, the state of a checkpoint of any layout.

    Raises:
        BadInput: for an optimizer that is not one of gracile.
    """
    if not isinstance(optimizer, ShardedOptimizer):
        raise BadInput(
            f"{type(optimizer).__name__} cannot be split anew; resume {checkpoint} as {saved(checkpoint)}, or train "
            "with an optimizer of gracile"
        )
    file = checkpoint / FULL_STATE
    split = file.is_file()
    state = torch.load(file if split else checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
    load_full_state(optimizer, state if split else full_state_of(type(optimizer).__name__, state))
