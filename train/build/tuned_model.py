"""The model of a fine-tuning: a saved one, with a head for its task, an adapter on it, or 4 bits beneath that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...target_modules import output_layers
from .. import sources
from ..config.arguments import DTYPES
from ..config.finetune_arguments import FinetuneConfig
from ..data.examples import Collator
from ..data.tuning import TuningData
from ..engines.deepspeed import unpartitioned
from ..errors import BadInput
from .adapter import adapted_without_memory, with_adapter
from .four_bits import four_bits, kept_trainable, quantized_without_memory
from .selected import freeze_others

CPU_BLOCK = 64  # weights of a row that bitsandbytes quantizes together


def base_architecture(config: FinetuneConfig) -> PreTrainedConfig:
    """The saved model's configuration; nothing is allocated."""
    found: PreTrainedConfig = sources.config_of("model", config.model.model, config.model.trust_remote_code)
    return found


def known_classes(architecture: PreTrainedConfig) -> list[str]:
    """Those that a saved model classifies into; none for a model of another task."""
    heads = getattr(architecture, "architectures", None) or []
    if not any("ForSequenceClassification" in name for name in heads):
        return []
    names: Any = architecture.id2label or {}
    return [str(names[number]) for number in sorted(names)]


def untrained_base(config: FinetuneConfig, architecture: PreTrainedConfig, classes: Sequence[str]) -> PreTrainedModel:
    """The model without an adapter, on the meta device.

    Raises:
        BadInput: for a task or an attention that it has no form for.
    """
    chosen = config.model
    kind: Any = AutoModelForSequenceClassification if config.classifies else AutoModelForCausalLM
    if classes:
        architecture.num_labels = len(classes)
    keywords = {"trust_remote_code": chosen.trust_remote_code, "dtype": DTYPES[chosen.dtype], **_attention(config)}
    with torch.device("meta"), unpartitioned(config.run):
        try:
            built: PreTrainedModel = kind.from_config(architecture, **keywords)
        except (ArithmeticError, ImportError, LookupError, RuntimeError, ValueError) as error:
            named = chosen.attn_implementation
            wanted = "has no form for this task" if named is None else f"has no attn_implementation {named!r} here"
            raise BadInput(f"model {chosen.model!r} {wanted}: {_line(error)}") from None
    return built


def _attention(config: FinetuneConfig) -> dict[str, Any]:
    named = config.model.attn_implementation
    return {} if named is None else {"attn_implementation": named}


def load_base(
    config: FinetuneConfig, classes: Sequence[str], source: str | None = None, quantized: bool | None = None
) -> PreTrainedModel:
    """The saved model, or the one in the folder ``source``, whole or as ZeRO 3 splits it.

    Args:
        classes: of a classification head, which is new where the saved model has none.
        quantized: whether in 4 bits; by default as ``quantize`` says.
    """
    chosen, keywords = config.model, {"dtype": DTYPES[config.model.dtype]}
    more: dict[str, Any] = _attention(config)
    if (chosen.quantize is not None) if quantized is None else quantized:
        more["quantization_config"] = four_bits(config)
    kind: Any = AutoModelForCausalLM
    if config.classifies:
        kind = AutoModelForSequenceClassification
        more |= {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    trusted = chosen.trust_remote_code
    model: PreTrainedModel = sources.load(kind, "model", source or chosen.model, trusted, **keywords, **more)
    return kept_trainable(model)


def build_tuned(
    config: FinetuneConfig, data: TuningData, collate: Collator, checkpoint: Path | None
) -> PreTrainedModel:
    """What is trained, with a checkpoint's weights where one is given: engines copy them when they wrap the model."""
    if not config.has_adapter:
        model = load_base(config, data.classes, None if checkpoint is None else str(checkpoint))
        freeze_others(model, config)
        return model
    with unpartitioned(config.run):  # an adapter may be made from whole weights
        base = load_base(config, data.classes)
        if config.model.quantize is not None:
            import peft

            base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        tuned = with_adapter(base, config, data, collate)
        if checkpoint is not None:
            _load_adapter(tuned, checkpoint)
    return tuned


def planned_tuned(config: FinetuneConfig, architecture: PreTrainedConfig) -> PreTrainedModel:
    """What is trained, on the meta device: no weights are read, and none are needed.

    Raises:
        BadInput: for what the model or the adapter refuses, or an adapter that is made from weights alone.
    """
    model = untrained_base(config, architecture, known_classes(architecture))
    if config.classifies and model.config.pad_token_id is None:
        model.config.pad_token_id = 0  # which the tokenizer gives in a run
    if not config.has_adapter:
        freeze_others(model, config)
        return model
    if config.model.quantize is not None:
        import peft

        quantized = quantized_without_memory(model, config)
        model = peft.prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False)
    with torch.device("meta"), unpartitioned(config.run):
        tuned: PreTrainedModel = adapted_without_memory(model, config)
    return tuned


def _load_adapter(model: Any, checkpoint: Path) -> None:
    try:
        model.load_adapter(str(checkpoint), model.active_adapters[0], is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadInput(f"{checkpoint} does not hold this adapter: {_line(error)}") from None


def check_widths(model: PreTrainedModel) -> None:
    """Refuse 4 bits on a CPU for layers that bitsandbytes has no kernel for there.

    Raises:
        BadInput: for the first of them.
    """
    output = output_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in output and module.in_features % CPU_BLOCK:
            raise BadInput(
                f"quantize: {name} has {module.in_features} inputs, and on a CPU bitsandbytes needs multiples of "
                f"{CPU_BLOCK}; leave quantize out, or use a GPU"
            )


def prepare_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a model which tokens begin, end and pad, as its tokenizer has them; a chat template's end stays."""
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is None:
            continue
        for token in ("pad_token_id", "bos_token_id"):
            setattr(settings, token, getattr(tokenizer, token))
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
