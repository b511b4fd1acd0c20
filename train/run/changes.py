"""What differs between a run and its resumption: each key is honoured, with what follows said, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...registry import OPTIMIZERS
from ..config.arguments import PATH_KEYS, AnySettings, RunArguments
from ..config.parser import defaults
from ..data.identity import PLACES
from ..data.stream import STREAM_FILE
from ..engines import layout as layouts
from ..errors import BadInput

# Keys of the learning rate's schedule, which is made anew and taken up at the step of the checkpoint.
SCHEDULE = {
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
}
BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps"}
STEP = {"weight_decay", "max_grad_norm"}
# Whether these name the same data is seen from the data itself.
DATA = {"dataset_config", "text_column", *PLACES}
OF_A_START = ("output_dir", "ignore_data_changes")  # and of no run
# What changes no step: when and where something is logged, evaluated or saved, and how the work is done.
AROUND = {
    "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level",
    "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "include_num_input_tokens_seen", "eval_strategy", "eval_steps", "eval_delay",
    "evaluate_at", "eval_on_start", "per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only",
    "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "push_to_hub", "hub_private_repo",
    "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs", "torch_empty_cache_steps", "skip_memory_metrics",
    "deepspeed", "fsdp", "fsdp_config", "use_cpu", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph", "local_rank", "trust_remote_code",
}  # fmt: skip
OWN_AROUND = {"keep_gradients", "clip_in_two_passes"}  # the same of our keys
NOT_LAMBDAS = {"reduce_lr_on_plateau", "greedy"}  # their rate follows from losses, not from the step


@dataclass(frozen=True)
class Change:
    """A key that has another value than the run had, and what follows."""

    key: str
    before: Any
    now: Any
    effect: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now}; {self.effect}"


def between(saved: Mapping[str, Any], config: AnySettings, output_dir: Path, checkpoint: Path | None) -> list[Change]:
    """The keys of ``config`` that differ from a run's, as its run.yaml has them. What an older one does not name was at
    its default.

    Raises:
        BadInput: for one that cannot change within a run.
    """
    step = 0 if checkpoint is None else step_of(checkpoint)
    saved = {**defaults(config.optimizer.optimizer, type(config)), **saved}
    found = []
    size = None if checkpoint is None else _size_of(saved, config, checkpoint)
    for key, value in config.resolved().items():
        if key not in OF_A_START and not _same(key, saved[key], value):
            effect = size if key in BATCH and size is not None else _effect(key, config, step)
            if effect is None:
                raise BadInput(
                    f"{key} is {value!r} but the run in {str(output_dir)!r} has {saved[key]!r}; "
                    "resume with that, or start a new run in another --output_dir"
                )
            found.append(Change(key, saved[key], value, effect))
    _refuse_impossible(found, saved, config, checkpoint, step)
    return found


def _effect(key: str, config: AnySettings, step: int) -> str | None:
    """What follows from a change of the key; None where it cannot change."""
    if key in SCHEDULE:
        clocks = OPTIMIZERS[config.optimizer.optimizer].clocks
        kept = [name for name in clocks if key == "max_steps" and getattr(config.optimizer, name, None) is None]
        more = f"; {', '.join(kept)} stays as it was" if kept and step else ""
        return f"the learning rate is that of the new schedule from step {step + 1} on{more}"
    if key in STEP or key in BATCH:
        return f"from step {step + 1} on"
    if key in DATA:
        return "the same data under another name"
    return f"from step {step + 1} on; no step computes anything else" if key in AROUND | OWN_AROUND else None


def _size_of(saved: Mapping[str, Any], config: AnySettings, checkpoint: Path) -> str:
    layout, run = layouts.saved(checkpoint), config.run
    told = int(saved["per_device_train_batch_size"]) * int(saved["gradient_accumulation_steps"]) * run.world_size
    return size_of_steps(run, checkpoint, told if layout is None else layout.examples_per_step)


def size_of_steps(run: RunArguments, checkpoint: Path, before: int) -> str:
    """How many examples a step takes after a checkpoint whose steps took ``before``, and where the data goes on."""
    now, step = layouts.Layout.of(run).examples_per_step, step_of(checkpoint)
    if now == before:
        return f"a step takes {now:,} examples as before"
    steps = f"a step takes {now:,} examples from step {step + 1} on, {before:,} before"
    if run.ignore_data_skip:
        return steps
    if (checkpoint / STREAM_FILE).is_file():
        return f"{steps}; the data goes on where it was"
    # the Trainer skips batches of the new size, by which its epochs and the run have their ends
    apart = f"{abs(now - before) * step:,} {'are left out' if now > before else 'come again'}"
    return f"{steps}; the data goes on at example {now * step:,} in place of {before * step:,}: {apart}"


def _refuse_impossible(
    found: list[Change], saved: Mapping[str, Any], config: AnySettings, checkpoint: Path | None, step: int
) -> None:
    changed = {change.key for change in found}
    if "max_steps" in changed and 0 < config.run.max_steps < step:
        raise BadInput(
            f"max_steps is {config.run.max_steps} but {checkpoint} is at step {step} already; give more steps, or name "
            "an older checkpoint as resume_from_checkpoint"
        )
    types = {str(saved.get("lr_scheduler_type")), str(config.resolved()["lr_scheduler_type"])}
    if changed & SCHEDULE and step and types & NOT_LAMBDAS:
        key = sorted(changed & SCHEDULE)[0]
        raise BadInput(f"{key} cannot change within a run whose lr_scheduler_type is {sorted(types & NOT_LAMBDAS)[0]}")


def step_of(checkpoint: Path) -> int:
    """How many steps a checkpoint has behind it."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])


def _same(key: str, one: Any, other: Any) -> bool:
    """Equal values; mappings, which are JSON text here, may differ in spaces, and paths in where they begin."""
    if one == other:
        return True
    if key in PATH_KEYS:
        paths = [value if isinstance(value, list) else [value] for value in (one, other)]
        if all(isinstance(path, str) for found in paths for path in found):
            return [Path(path).resolve() for path in paths[0]] == [Path(path).resolve() for path in paths[1]]
    try:
        return bool(json.loads(one) == json.loads(other))
    except (TypeError, ValueError):
        return False
