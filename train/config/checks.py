"""Checks of a run's settings, before anything is read or built."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from inspect import signature
from typing import Any

from accelerate.state import DistributedType
from huggingface_hub import whoami
from transformers import PreTrainedConfig
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import ParallelMode

from ...optim import HyperSparseAdamW
from ...optim.core.optimizer import ShardedOptimizer
from ...registry import LAYERS, OPTIMIZERS, LayerEntry, OptimizerEntry
from ...validation import is_whole, nearest
from ..engines.layout import DEEPSPEED, Layout
from ..errors import BadInput
from .arguments import ALL, COORDINATES, DTYPES, NOTHING, AnySettings, Config, Keywords, RunArguments

KEPT = (ALL, COORDINATES, NOTHING)
# Parameters of a layer's constructor that are not the configuration's to give.
NOT_KEYWORDS = {"in_features", "out_features", "bias", "name", "placed", "model"}


def check_values(config: Config) -> None:
    """Refuse values of a pretraining out of range, and those that do not go together.

    Raises:
        BadInput: for the first of them.
    """
    check_shared(config, {"validation_blocks": config.data.validation_blocks})
    check_layer(config)
    _check_weight_bits(config)
    _check_art(config)


def check_shared(config: AnySettings, at_least_one: Mapping[str, int]) -> None:
    """Refuse values out of range of keys that every command has, and those of ``at_least_one`` below 1.

    Raises:
        BadInput: for the first of them.
    """
    run, data, gap = config.run, config.data, config.optimizer.update_proj_gap
    smallest: dict[str, tuple[int | None, int]] = {
        "block_size": (data.block_size, 2),  # one token to see and one to predict
        **{name: (value, 1) for name, value in at_least_one.items()},
        "per_device_train_batch_size": (run.per_device_train_batch_size, 1),
        "per_device_eval_batch_size": (run.per_device_eval_batch_size, 1),
        "gradient_accumulation_steps": (run.gradient_accumulation_steps, 1),
        "rank": (config.optimizer.rank, 1),
        "update_proj_gap": (1 if gap is None else gap, 1),
    }
    for name, (value, least) in smallest.items():
        if value is not None and value < least:
            raise BadInput(f"{name} must be at least {least}, got {value}")
    if run.max_steps == 0 or (run.max_steps < 0 and run.num_train_epochs <= 0):
        raise BadInput(f"nothing to train: max_steps is {run.max_steps}, num_train_epochs {run.num_train_epochs}")
    for name, value in (("seed", run.seed), ("data_seed", run.data_seed)):
        if value is not None and not 0 <= value < 2**32:
            raise BadInput(f"{name} must be a whole number from 0 to {2**32 - 1}, got {value}")
    _check_run(run)
    _check_reports(run)
    if config.model.dtype not in DTYPES:
        raise BadInput(f"unknown dtype {config.model.dtype!r}; {nearest(config.model.dtype, DTYPES)}")
    if run.fsdp:
        _check_fsdp(run)
    _check_kept_gradients(config)


def _check_kept_gradients(config: AnySettings) -> None:
    """Refuse to free gradients where something wants all of them."""
    run, kept = config.run, config.optimizer.keep_gradients
    if kept not in KEPT:
        raise BadInput(f"keep_gradients must be one of {', '.join(KEPT)}, got {kept!r}; {nearest(kept, KEPT)}")
    if config.optimizer.clip_in_two_passes:
        _check_two_passes(run, kept)
    if kept == ALL:
        return
    frees = f"keep_gradients: {kept} frees gradients in the backward pass"
    name = config.optimizer.optimizer
    kind = optimizer_entry(name).cls
    if not issubclass(kind, ShardedOptimizer):
        raise BadInput(f"{frees}, which {name} cannot; choose an optimizer of gracile")
    if kept == COORDINATES and not kind.keeps_coordinates:
        raise BadInput(f"{frees}, and {name} needs more of them than coordinates; give --keep_gradients {NOTHING}")
    if kept == NOTHING:
        _check_nothing_kept(run, frees, config.optimizer.clip_in_two_passes)
    if run.deepspeed:
        raise BadInput(f"{frees}, and DeepSpeed owns them; use DistributedDataParallel or FSDP2, or one process")
    assert isinstance(run.accelerator_config, AcceleratorConfig), "TrainingArguments reads it"
    of_passes = run.accelerator_config.gradient_accumulation_kwargs or {}
    if run.fsdp and kept == COORDINATES and of_passes.get("sync_each_batch") is False:
        raise BadInput(
            f"{frees}, which FSDP must have summed in each pass, and accelerator_config: gradient_accumulation_kwargs: "
            "sync_each_batch is false; leave it out"
        )


def _check_two_passes(run: RunArguments, kept: str) -> None:
    if kept != NOTHING:
        raise BadInput(
            f"clip_in_two_passes is for keep_gradients: {NOTHING}, got {kept}, which clips in one pass; leave it out"
        )
    if not run.max_grad_norm:
        raise BadInput("clip_in_two_passes needs max_grad_norm above 0, got 0; leave it out, or give --max_grad_norm 1")


def _check_nothing_kept(run: RunArguments, frees: str, two_passes: bool) -> None:
    """Refuse what wants the gradients of a whole step."""
    if run.max_grad_norm and not two_passes:
        raise BadInput(
            f"{frees}, and max_grad_norm {run.max_grad_norm:g} clips by the norm of all; give --max_grad_norm 0, or "
            "--clip_in_two_passes true, which passes twice over each batch"
        )
    if run.gradient_accumulation_steps > 1:
        raise BadInput(
            f"{frees}, and gradient_accumulation_steps {run.gradient_accumulation_steps} adds up several passes; give "
            "--gradient_accumulation_steps 1 and a larger per_device_train_batch_size"
        )
    if run.fp16:
        raise BadInput(f"{frees}, and fp16 scales them until all are there; give --bf16 true")


def _check_run(run: RunArguments) -> None:
    """Refuse what ``TrainingArguments`` takes and no run can go by."""
    clocks = {kind: getattr(run, f"{kind}_steps") for kind in ("save", "logging", "eval")}
    for kind, every in clocks.items():
        chosen = getattr(run, f"{kind}_strategy")
        if getattr(chosen, "value", chosen) == "steps" and (every is None or not 0 < every < math.inf):
            raise BadInput(f"{kind}_steps must be above 0, got {every}; {kind}_strategy: no turns it off")
    ranges: dict[str, tuple[Any, float, float]] = {
        "max_grad_norm": (run.max_grad_norm, 0, sys.float_info.max),
        "save_total_limit": (1 if run.save_total_limit is None else run.save_total_limit, 1, math.inf),
        "dataloader_num_workers": (run.dataloader_num_workers, 0, math.inf),
        "label_smoothing_factor": (run.label_smoothing_factor, 0, 1),
        "num_train_epochs": (run.num_train_epochs, -1, sys.float_info.max),
        "evaluate_at": (min(run.evaluate_at, default=1), 1, math.inf),
    }
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            above = f" and at most {most:g}" if name == "label_smoothing_factor" else ""
            raise BadInput(f"{name} must be at least {least}{above}, got {value}")
    if run.fp16 and run.use_cpu:
        raise BadInput("fp16 needs a GPU; bf16: true works on CPUs, too")


def _check_reports(run: RunArguments) -> None:
    """Refuse a place to report to that is not installed, and a hub that cannot be reached."""
    present = {*get_available_reporting_integrations(), "all", "none"}
    for name in [run.report_to] if isinstance(run.report_to, str) else run.report_to or []:
        if name not in present:
            raise BadInput(f"report_to {name!r} is not installed or not known; choose of {', '.join(sorted(present))}")
    if run.push_to_hub:
        try:
            whoami(run.hub_token)
        except Exception as error:  # every kind of network and hub error means the same to the user
            raise BadInput(f"push_to_hub: the hub does not answer: {' '.join(str(error).split())}") from None


def check_sizes(config: AnySettings, architecture: PreTrainedConfig) -> None:
    """Refuse examples that are longer than the model has positions.

    Raises:
        BadInput: for such a block_size.
    """
    most = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if most is not None and config.data.block_size > most:
        size = config.data.block_size
        new = f', or model_overrides: {{"max_position_embeddings": {size}}}' if isinstance(config, Config) else ""
        raise BadInput(f"block_size is {size} but the model has {most} positions; give a smaller block_size{new}")


def optimizer_entry(name: str) -> OptimizerEntry:
    """The registry's entry of an optimizer.

    Raises:
        BadInput: for an unknown one.
    """
    if name not in OPTIMIZERS:
        raise BadInput(f"unknown optimizer {name!r}; {nearest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name]


def _check_fsdp(run: RunArguments) -> None:
    assert isinstance(run.fsdp_config, dict), "TrainingArguments reads it"
    version = int(run.fsdp_config.get("version", 2))
    if version != 2:
        raise BadInput(f"fsdp_config: version must be 2, got {version}: version 1 hides the rows of a matrix")
    if run.parallel_mode is not ParallelMode.DISTRIBUTED:
        raise BadInput("fsdp splits a model over processes, and there is one; launch several with torchrun")
    if run.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise BadInput("fsdp: accelerate splits models over GPUs, not over CPUs; leave it out, or use deepspeed")


# ---- layers ---------------------------------------------------------------------------------------------------------


def accepted_keywords(kind: type) -> set[str]:
    """What ``layer_args`` can give to a layer, or to its schedule."""
    return set(signature(kind).parameters) - NOT_KEYWORDS


def check_layer(config: Config) -> None:
    """Refuse a layer, an optimizer and a layout that do not go together.

    Raises:
        BadInput: for an unknown layer, an optimizer that does not train it, a keyword that nothing takes, or a layout
            that the layer cannot be trained in.
    """
    name, optimizer, given = config.model.layer, config.optimizer.optimizer, config.model.layer_args
    needed = OPTIMIZERS[optimizer].layer if optimizer in OPTIMIZERS else None
    if needed is not None and needed != name:
        raise BadInput(f"optimizer {optimizer} needs layer: {needed}, got {name or 'none'}")
    if name is None:
        if given is not None:
            raise BadInput(f"layer_args {given} need a layer; choose one of {', '.join(LAYERS)}")
        return
    if name not in LAYERS:
        raise BadInput(f"unknown layer {name!r}; {nearest(name, LAYERS)}")
    entry = LAYERS[name]
    if entry.optimizers and optimizer not in entry.optimizers:
        raise BadInput(f"layer {name} needs optimizer: {' or '.join(entry.optimizers)}, got {optimizer}")
    known = accepted_keywords(entry.cls) | (accepted_keywords(entry.schedule) if entry.schedule else set())
    if entry.takes_masks:
        known -= {"sparsity"}  # the optimizer's: one number for both
        _check_first_masks(config)
    for key in given or {}:
        if key not in known:
            raise BadInput(f"layer_args: {name} takes no {key!r}; {nearest(key, known)}")
    _check_layer_layout(entry, config)


def _check_layer_layout(entry: LayerEntry, config: Config) -> None:
    layout = Layout.of(config.run)
    if entry.whole_factors and layout.splits_weights:
        raise BadInput(
            f"layer {entry.name} needs whole factors for its penalty, which ZeRO 3 and FSDP split; use ZeRO 2"
        )
    key = entry.float32_unless
    learns = key is not None and (config.model.layer_args or Keywords()).get(key) is None
    if learns and config.model.dtype == "bfloat16" and layout.engine != DEEPSPEED:  # which keeps fp32 weights
        raise BadInput(
            f"layer {entry.name} needs dtype: float32, for thresholds move by less than bfloat16 can hold; bf16: true "
            "computes in it all the same"
        )


def _check_first_masks(config: Config) -> None:
    chosen = config.optimizer
    key = signature(OPTIMIZERS[chosen.optimizer].cls).parameters.get("initial_sparsity")
    start = (chosen.optimizer_args or Keywords()).get("initial_sparsity", None if key is None else key.default)
    if start is not None:
        raise BadInput(
            f"layer {config.model.layer} with initial_sparsity {start} is a larger dense model at first; give "
            'optimizer_args: {"initial_sparsity": null}'
        )


def moves_int8_weights(optimizer: str) -> bool:
    """Whether an optimizer, by its name, moves weights in 8 bits."""
    kind = optimizer_entry(optimizer).cls
    return issubclass(kind, ShardedOptimizer) and kind.moves_int8_weights


def _check_weight_bits(config: Config) -> None:
    chosen, optimizer = config.model, config.optimizer.optimizer
    if chosen.weight_group_size < 1:
        raise BadInput(f"weight_group_size must be at least 1, got {chosen.weight_group_size}")
    if chosen.weight_bits is None:
        if chosen.weight_group_size != type(chosen).weight_group_size:  # run.yaml has every key
            raise BadInput("weight_group_size needs weight_bits: 8; leave it out")
        return
    if chosen.weight_bits != 8:
        raise BadInput(f"weight_bits must be 8, or left out for weights in dtype, got {chosen.weight_bits}")
    if chosen.layer is not None:
        raise BadInput(f"weight_bits: 8 is for ordinary layers, got layer {chosen.layer}; leave one of the two out")
    if not moves_int8_weights(optimizer):
        able = ", ".join(name for name in OPTIMIZERS if moves_int8_weights(name))
        raise BadInput(f"weight_bits: 8 cannot be moved by optimizer {optimizer}; choose one of {able}")
    layout = Layout.of(config.run)
    if layout.engine == DEEPSPEED or layout.splits_weights:
        raise BadInput(
            f"weight_bits: 8 is for one process or DistributedDataParallel, got {layout.engine}: DeepSpeed makes flat "
            "tensors of weights, accelerate's FSDP casts them; in a script of your own, fully_shard splits them"
        )


# ---- ART ------------------------------------------------------------------------------------------------------------


def _check_art(config: Config) -> None:
    every, optimizer = config.optimizer.art_every, config.optimizer.optimizer
    if every is None:
        return
    if not is_whole(every) or every < 1:
        raise BadInput(f"art_every must be a whole number >= 1, got {every}")
    if not issubclass(optimizer_entry(optimizer).cls, HyperSparseAdamW):
        raise BadInput(f"art_every is for optimizer hyper_sparse_adamw, got {optimizer}")
    if Layout.of(config.run).splits_weights:
        raise BadInput("art_every needs whole weights, which ZeRO 3 and FSDP split; leave it out, prune_at is a step")
