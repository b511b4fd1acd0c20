"""Checks of a fine-tuning's settings, before anything is read or built."""

from __future__ import annotations

from importlib.util import find_spec

from ...validation import nearest
from ..engines.layout import Layout
from ..errors import BadInput
from .checks import check_shared, optimizer_entry
from .finetune_arguments import FORMATS, FOUR_BIT, LABEL, TOO_LONG, FinetuneConfig

NOT_SPLIT = f"quantize {FOUR_BIT} needs whole weights, which ZeRO 3 and FSDP split; use ZeRO 2 or less"


def check_finetune(config: FinetuneConfig, reads_data: bool = True) -> None:
    """Refuse values out of range, and those that do not go together.

    Args:
        reads_data: false in a plan, which needs none.

    Raises:
        BadInput: for the first of them.
    """
    data = config.data
    if not config.model.model.strip():
        raise BadInput("model is not set; give the folder of a saved model, or hub:org/name, with --model")
    if reads_data and not data.dataset:
        raise BadInput("dataset is not set; give the file of what is trained on with --dataset")
    if len(set(data.dataset)) < len(data.dataset):
        raise BadInput(f"dataset names {', '.join(data.dataset)}: each once")
    for key, value, known in (("format", data.format, FORMATS), ("too_long", data.too_long, TOO_LONG)):
        if value is not None and value not in known:
            raise BadInput(f"{key} must be one of {', '.join(known)}, got {value!r}; {nearest(value, known)}")
    if data.format == LABEL and data.packing:
        raise BadInput("packing lays texts into one block, of which a classification head sees the end; leave it out")
    if data.packing and getattr(config.run, "use_cache", False):
        raise BadInput("packing needs use_cache: false; with a cache transformers takes a block for one example")
    check_shared(config, {"validation_examples": data.validation_examples})
    if data.calibration_examples is not None and data.calibration_examples < 1:
        raise BadInput(f"calibration_examples must be at least 1, got {data.calibration_examples}")
    entry = optimizer_entry(config.optimizer.optimizer)
    if entry.layer is not None:
        raise BadInput(
            f"optimizer {entry.name} trains layers of its own ({entry.layer}), which only gracile pretrain puts into a "
            "model; choose another"
        )
    _check_quantized(config)
    named = config.model.attn_implementation
    if named is not None and "/" in named and not config.model.trust_remote_code:
        raise BadInput(
            f"attn_implementation {named!r} is code on the hub, which is not run; --trust_remote_code true would run it"
        )


def refuse_split(config: FinetuneConfig, stage: int) -> None:
    """Refuse ZeRO 3 for what needs whole weights.

    Raises:
        BadInput: for a base in 4 bits, or a selection.
    """
    chosen = config.model
    if stage == 3 and chosen.quantize is not None:
        raise BadInput(NOT_SPLIT)
    if stage == 3 and chosen.selection is not None:
        raise BadInput(f"selection {chosen.selection} chooses from whole weights, which ZeRO 3 has split; use ZeRO 2")


def _check_quantized(config: FinetuneConfig) -> None:
    """Refuse 4 bits where nothing can be trained through them."""
    chosen = config.model.quantize
    if chosen is None:
        return
    if chosen != FOUR_BIT:
        raise BadInput(f"quantize must be {FOUR_BIT}, got {chosen!r}")
    if not config.has_adapter:
        raise BadInput(
            f"quantize {FOUR_BIT} freezes the model, and without an adapter nothing would be trained; give an adapter, "
            "or leave quantize out and choose an optimizer with little state, such as galore_adamw"
        )
    if Layout.of(config.run).splits_weights:
        raise BadInput(NOT_SPLIT)
    if find_spec("bitsandbytes") is None:
        raise BadInput(f"quantize {FOUR_BIT} needs bitsandbytes; install it with: pip install 'gracile[8bit]'")
