"""DeepSpeed: what a run needs before its model is built, which options are refused, and what ZeRO holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ..errors import BadInput

# Path of a key in DeepSpeed's configuration, the values that are refused, and why.
REFUSED: list[tuple[tuple[str, ...], Any, str]] = [
    (
        ("zero_optimization", "elastic_checkpoint"),
        (True,),
        "it rearranges state that is no copy of a partition; leave it out: runs resume on any number of processes",
    ),
    (
        ("torch_autocast", "dtype"),
        ("fp16", "float16", "torch.float16"),
        "a process may skip a step alone; use bf16",
    ),
    (
        ("zero_optimization", "zero_hpz_partition_size"),
        range(2, 2**31),
        "weights are split a second time there; leave it out",
    ),
    (
        ("zero_optimization", "mics_shard_size"),
        range(1, 2**31),
        "parameters are split within groups of processes there; leave it out",
    ),
    (
        ("tensor_parallel", "autotp_size"),
        range(2, 2**31),
        "matrices are split by columns there; only ZeRO's partitions are supported",
    ),
]

# What a clean checkpoint of the engine holds beside tensors and plain values.
SAFE_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


def safe_classes() -> list[Any]:
    """``SAFE_CLASSES`` themselves, for ``torch.serialization.safe_globals``."""
    parts = [name.rpartition(".") for name in SAFE_CLASSES]
    return [getattr(import_module(module), name) for module, _, name in parts]


def _chosen(run: TrainingArguments) -> Any:
    """DeepSpeed's configuration as transformers holds it, or None without one."""
    return getattr(run, "hf_deepspeed_config", None)


def settings_of(run: TrainingArguments) -> dict[str, Any] | None:
    """The run's DeepSpeed configuration, or None without one."""
    chosen = _chosen(run)
    return None if chosen is None else chosen.config


def prepare(run: TrainingArguments) -> None:
    """Start DeepSpeed's process group, so that ZeRO 3 can split the model while it is built.

    Raises:
        BadInput: for a configuration that cannot work with our optimizers.
    """
    settings = settings_of(run)
    if settings is None:
        return
    if find_spec("deepspeed") is None:
        raise BadInput("deepspeed is not installed; install it with: pip install 'gracile[deepspeed]'")
    refuse(settings)
    import deepspeed

    deepspeed.init_distributed("gloo" if run.use_cpu else None)


def refuse(settings: dict[str, Any]) -> None:
    """Raises BadInput for a DeepSpeed configuration that cannot work with our optimizers."""
    if not settings.get("torch_autocast", {}).get("enabled"):
        settings = {**settings, "torch_autocast": {}}
    for path, values, reason in REFUSED:
        value: Any = settings
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and value in values:
            raise BadInput(f"deepspeed: {'.'.join(path)} is {value!r}, which cannot work here: {reason}")
    if not settings.get("zero_allow_untested_optimizer"):
        raise BadInput("deepspeed: zero_allow_untested_optimizer must be true; DeepSpeed asks for it of any optimizer")
    offload = settings.get("zero_optimization", {}).get("offload_optimizer")
    on_cpu = isinstance(offload, dict) and offload.get("device") not in (None, "none")
    if on_cpu and settings.get("zero_force_ds_cpu_optimizer", True):
        raise BadInput(
            "deepspeed: zero_force_ds_cpu_optimizer must be false where the optimizer is offloaded; "
            "DeepSpeed would put its own Adam in place of the one chosen"
        )


@contextmanager
def unpartitioned(run: TrainingArguments) -> Iterator[None]:
    """Models built in the block are not split by ZeRO 3."""
    chosen = _chosen(run)
    if chosen is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(chosen)


# ---- what ZeRO's optimizer holds in this process, beside the optimizer that it was given ----------------------------


def is_zero(optimizer: Any) -> bool:
    return hasattr(optimizer, "averaged_gradients")


def masters(zero: Any) -> list[Tensor]:
    """The fp32 copies that are stepped."""
    held = vars(zero)
    found: list[Tensor] = held.get("single_partition_of_fp32_groups") or held.get("fp32_partitioned_groups_flat") or []
    return found


def gradients(zero: Any) -> list[Tensor]:
    """Partitions of averaged gradients, between the backward pass and the step; of the masters, where offloaded."""
    parts = [part for part in (zero.averaged_gradients or {}).values() if part is not None]
    lists = [part if isinstance(part, (list, tuple)) else [part] for part in parts]
    lists.append([flat.grad for flat in masters(zero)])
    return [tensor for part in lists for tensor in part if tensor is not None]


def buckets(zero: Any) -> list[Tensor]:
    """The communication buffers that are kept from step to step."""
    held = [bucket.buffer for bucket in getattr(zero, "ipg_buckets", {}).values()]
    lists = [buffer if isinstance(buffer, list) else [buffer] for buffer in held if buffer is not None]
    return [tensor for buffer in lists for tensor in buffer]
