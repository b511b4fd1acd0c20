"""A base in 4 bits: what it is loaded with, its layers without memory, and the tensors that a weight has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ..config.arguments import DTYPES
from ..config.finetune_arguments import FinetuneConfig

# bitsandbytes' sizes: weights that share a scale, scales that share one in turn, and how many values each can have.
BLOCK, NESTED_BLOCK, VALUES, NESTED_VALUES = 64, 256, 16, 256


def four_bits(config: FinetuneConfig) -> BitsAndBytesConfig:
    """NF4 with double quantization."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.run.bf16 else DTYPES[config.model.dtype],
    )


def quantized_without_memory(model: PreTrainedModel, config: FinetuneConfig) -> PreTrainedModel:
    """``model``, of the meta device, with the layers in 4 bits that ``from_pretrained`` gives it."""
    quantizer = AutoHfQuantizer.from_config(four_bits(config), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None, dtype=DTYPES[config.model.dtype])
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state"):
            weight: Any = module.weight
            state = _state(weight)
            weight.data = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
            weight.quant_state = module.quant_state = state
            weight.bnb_quantized = True
    quantizer.postprocess_model(model)
    return kept_trainable(model)


def kept_trainable(model: PreTrainedModel) -> PreTrainedModel:
    """``model``, whose layers in 4 bits stay as they are when it is evaluated.

    On a CPU with AVX512-BF16 bitsandbytes lays them out anew then, for a product through which no gradient flows, and
    never back: all later steps would train with wrong gradients.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model


def _state(weight: Tensor) -> Any:
    """What goes with a weight in 4 bits: scales in 8 bits, and scales of those."""
    from bitsandbytes.functional import QuantState

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = -(-weight.numel() // BLOCK)
    nested = QuantState(
        empty(-(-blocks // NESTED_BLOCK)), code=empty(NESTED_VALUES), blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    return QuantState(
        empty(blocks, dtype=torch.uint8),
        shape=weight.shape,
        code=empty(VALUES),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=empty(),
        state2=nested,
    )


def scales_of(parameter: Tensor) -> Iterator[Tensor]:
    """The tensors that a weight in 4 bits has beside its bits; none of any other."""
    state = getattr(parameter, "quant_state", None)
    for own in (state, getattr(state, "state2", None)):
        found = () if own is None else (own.absmax, own.code, own.offset)
        yield from (tensor for tensor in found if isinstance(tensor, Tensor))
