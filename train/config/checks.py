"""Checks of a run's settings and of its output directory, all before anything is written."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from accelerate.state import DistributedType
from transformers.training_args import ParallelMode

from ...validation import nearest
from ..build import layers
from ..errors import BadInput
from ..run import art, checkpoints
from .arguments import Config, RunArguments

RUN_FILE = "run.yaml"
# What a run writes into its output directory and would overwrite in another's.
TRACES = (RUN_FILE, "metrics.json", "config.json", "model.safetensors", "model.safetensors.index.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_values(config: Config) -> None:
    run, data, gap = config.run, config.data, config.optimizer.update_proj_gap
    smallest = {
        "block_size": (data.block_size, 2),  # one token to see and one to predict
        "validation_blocks": (data.validation_blocks, 1),
        "per_device_train_batch_size": (run.per_device_train_batch_size, 1),
        "per_device_eval_batch_size": (run.per_device_eval_batch_size, 1),
        "gradient_accumulation_steps": (run.gradient_accumulation_steps, 1),
        "rank": (config.optimizer.rank, 1),
        "update_proj_gap": (1 if gap is None else gap, 1),
    }
    for name, (value, least) in smallest.items():
        if value < least:
            raise BadInput(f"{name} must be at least {least}, got {value}")
    if run.max_steps == 0 or (run.max_steps < 0 and run.num_train_epochs <= 0):
        raise BadInput(f"nothing to train: max_steps is {run.max_steps}, num_train_epochs {run.num_train_epochs}")
    if config.model.dtype not in DTYPES:
        raise BadInput(f"unknown dtype {config.model.dtype!r}; {nearest(config.model.dtype, DTYPES)}")
    if run.fsdp:
        _check_fsdp(run)
    layers.check(config)
    art.check(config)


def _check_fsdp(run: RunArguments) -> None:
    assert isinstance(run.fsdp_config, dict), "TrainingArguments reads it"
    version = int(run.fsdp_config.get("version", 2))
    if version != 2:
        raise BadInput(f"fsdp_config: version must be 2, got {version}: version 1 hides the rows of a matrix")
    if run.parallel_mode is not ParallelMode.DISTRIBUTED:
        raise BadInput("fsdp splits a model over processes, and there is one; launch several with torchrun")
    if run.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise BadInput("fsdp: accelerate splits models over GPUs, not over CPUs; leave it out, or use deepspeed")


def resuming(run: RunArguments) -> bool:
    return str(run.resume_from_checkpoint).lower() not in ("none", "false", "no", "0")


def starting_point(run: RunArguments) -> Path | None:
    """The checkpoint to continue from, or None to start at step 0.

    Raises:
        BadInput: for an output directory that holds another run, or a checkpoint that is not there or not whole.
    """
    output_dir = run.folder
    if output_dir.exists() and not output_dir.is_dir():
        raise BadInput(f"output_dir {run.output_dir!r} is a file; choose another")
    if not resuming(run):
        _refuse_traces(output_dir)
        return None
    wanted = str(run.resume_from_checkpoint)
    if wanted.lower() not in ("true", "yes", "1"):
        return _named_checkpoint(Path(wanted))
    newest, skipped = checkpoints.newest_whole(output_dir)
    if run.should_save:
        for checkpoint, reason in skipped.items():
            print(f"skipping {checkpoint}: {reason}")
    if newest is None:
        begun = (output_dir / RUN_FILE).is_file() and not (output_dir / "metrics.json").is_file()
        if not begun:
            raise BadInput(
                f"resume_from_checkpoint is {wanted!r} but output_dir {run.output_dir!r} holds no whole checkpoint; "
                "leave it out to start a new run"
            )
        if run.should_save:
            print(f"{output_dir} holds a run that was stopped before its first checkpoint: starting it again")
    return newest


def _refuse_traces(output_dir: Path) -> None:
    found = [name for name in TRACES if (output_dir / name).exists()]
    found += [checkpoint.name for checkpoint in checkpoints.checkpoints(output_dir)]
    if found:
        raise BadInput(
            f"output_dir {str(output_dir)!r} holds another run ({found[0]}); continue it with "
            "--resume_from_checkpoint true, or choose another --output_dir"
        )


def _named_checkpoint(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise BadInput(f"resume_from_checkpoint {str(checkpoint)!r} is no checkpoint; give its folder, or true")
    reason = checkpoints.fault(checkpoint)
    if reason is not None:
        raise BadInput(f"resume_from_checkpoint {str(checkpoint)!r} is not whole: {reason}; give another, or true")
    return checkpoint


def check_same_run(config: Config, output_dir: Path, data_identity: str) -> None:
    """Refuse to continue a run with another model, other data or another optimizer than it began with."""
    try:
        saved = yaml.safe_load((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except OSError:
        return  # a checkpoint that was copied away from its run
    for key, value in config.identity().items():
        if key in saved["config"] and saved["config"][key] != value:
            raise BadInput(
                f"{key} is {value!r} but the run in {str(output_dir)!r} has {saved['config'][key]!r}; "
                f"resume with that, or start a new run in another --output_dir"
            )
    if saved["data"] != data_identity:
        raise BadInput(
            f"dataset {config.data.dataset!r} or its tokenizer has changed since the run in {str(output_dir)!r} began; "
            "restore it, or start a new run in another --output_dir"
        )
