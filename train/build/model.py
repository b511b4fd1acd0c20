"""From a configuration to a model: its architecture, an empty model, and the one that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ...models.int8 import quantize_weights
from ...models.int8_untrained import build_int8
from ...models.llama import SIZES, build_llama, llama_config
from ...validation import is_whole, nearest
from .. import sources
from ..config.arguments import DTYPES, Config, Keywords, ModelArguments, RunArguments
from ..engines.deepspeed import unpartitioned
from ..errors import BadInput
from . import layers

# Fields of a size that count something.
SIDES = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
}  # fmt: skip


def architecture(chosen: ModelArguments) -> PreTrainedConfig:
    """The model's configuration; nothing is allocated."""
    overrides = chosen.model_overrides or Keywords()
    if chosen.model in SIZES:
        for key in SIDES & overrides.keys():
            if not is_whole(overrides[key]) or overrides[key] < 1:
                raise BadInput(f"model_overrides: {key} must be a whole number >= 1, got {overrides[key]!r}")
        try:
            return llama_config(chosen.model, **overrides)
        except ValueError as error:
            raise BadInput(str(error)) from None
    if overrides:
        raise BadInput(f"model_overrides {overrides} need a size name as model, got {chosen.model!r}")
    if "/" not in chosen.model and not chosen.model.startswith(sources.MARK) and not Path(chosen.model).is_dir():
        raise BadInput(
            f"unknown model {chosen.model!r}: neither a size nor a saved model; {nearest(chosen.model, SIZES)}"
        )
    config: PreTrainedConfig = sources.config_of("model", chosen.model, chosen.trust_remote_code)
    return config


def untrained(config: Config, architecture: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with new weights, whole, on the meta device: without memory."""
    with torch.device("meta"), unpartitioned(config.run):
        trusted = config.model.trust_remote_code
        try:
            built = AutoModelForCausalLM.from_config(architecture, dtype=dtype, trust_remote_code=trusted)
        except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise BadInput(f"model {config.model.model!r} cannot be built as it is configured: {reason}") from None
        if config.model.weight_bits is None:
            return layers.converted(built, config)
        with _weight_bits():
            return quantize_weights(built, group_size=config.model.weight_group_size)


def checkpoints_activations(run: RunArguments) -> bool:
    chosen: Any = getattr(run, "activation_checkpointing", None)  # its name since transformers 5.22
    return bool(run.gradient_checkpointing if chosen is None else chosen)


def checkpoint_activations(model: PreTrainedModel, run: RunArguments) -> None:
    """Turn on activation checkpointing, as the Trainer does it when ``run`` says so."""
    new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    keywords = dict(getattr(run, f"{name}_kwargs") or {})
    own = {key: keywords.pop(key) for key in ("every_n_layers", "offload") if key in keywords}
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": keywords or None}, **own)


def build_model(config: Config, checkpoint: Path | None) -> PreTrainedModel:
    """The model, with a checkpoint's weights where one is given: engines copy them when they wrap the model."""
    if config.model.layer is None and config.model.weight_bits is None:
        return _loaded(config.model, config.model.model if checkpoint is None else str(checkpoint))
    with unpartitioned(config.run):  # layers are made from whole weights
        if config.model.weight_bits is None:
            layered = layers.converted(_loaded(config.model, config.model.model), config)
        else:
            layered = _quantized(config.model)
    if checkpoint is not None:
        layers.load_weights(layered, checkpoint)
    return layered


def _quantized(chosen: ModelArguments) -> PreTrainedModel:
    """The model with its weights in 8 bits: a new one never has others."""
    build = partial(_loaded, chosen, chosen.model)
    with _weight_bits():
        if chosen.model in SIZES:
            return build_int8(build, chosen.weight_group_size)
        return quantize_weights(build(), group_size=chosen.weight_group_size)


@contextmanager
def _weight_bits() -> Iterator[None]:
    """What is wrong is wrong with this key."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"weight_bits: {error}") from None


def _loaded(chosen: ModelArguments, source: str) -> PreTrainedModel:
    dtype = DTYPES[chosen.dtype]
    if source in SIZES:
        return build_llama(source, dtype=dtype, **(chosen.model_overrides or Keywords()))
    model: PreTrainedModel = sources.model_of("model", source, chosen.trust_remote_code, dtype=dtype)
    return model
