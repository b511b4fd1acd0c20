"""LLaMA models by size name, as ``transformers.LlamaForCausalLM`` (Touvron et al. 2023, arXiv:2302.13971).

``llama_sizes.json`` holds the dimensions that the GaLore line of papers pretrains (Zhao et al. 2024,
arXiv:2403.03507), and ``2m``: the 9m body with a vocabulary of 4096, for a CPU.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, LlamaForCausalLM

from ..validation import nearest

SIZES: dict[str, dict[str, Any]] = json.loads(resources.files(__package__).joinpath("llama_sizes.json").read_text())


def llama_config(size: str, **overrides: Any) -> LlamaConfig:
    """The configuration of a size name such as ``"60m"``, with fields of ``LlamaConfig`` overridden.

    Args:
        size: a key of ``gracile.models.SIZES``, from ``2m`` to ``7b``.
        overrides: fields of ``transformers.LlamaConfig`` by name.

    Raises:
        ValueError: for an unknown size or field, or dimensions that do not fit each other.

    Example:
        >>> from gracile.models import llama_config
        >>> config = llama_config("60m", vocab_size=1000)
        >>> config.hidden_size, config.num_hidden_layers, config.vocab_size
        (512, 8, 1000)
    """
    if size not in SIZES:
        raise ValueError(f"unknown model size {size!r}; {nearest(size, SIZES)}")
    fields = set(LlamaConfig().to_dict())
    for name in overrides:
        if name not in fields:
            raise ValueError(f"unknown model field {name!r} = {overrides[name]!r}; {nearest(name, fields)}")
    try:
        return LlamaConfig(**{**SIZES[size], **overrides})
    except StrictDataclassError as error:
        reason = str(error.__cause__ or error)
        raise ValueError(f"model {size!r} with {overrides}: {reason}") from None


def build_llama(
    size: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> LlamaForCausalLM:
    """A freshly initialised LLaMA of a size name, as ``transformers.LlamaForCausalLM`` (arXiv:2302.13971).

    Args:
        size, overrides: as for ``llama_config``.
        device: where to make it; ``"meta"`` allocates nothing. None for the CPU.
        dtype: of the weights; None for fp32.

    Raises:
        ValueError: as ``llama_config``.

    Example:
        >>> from gracile.models import build_llama
        >>> model = build_llama("2m", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 4096])
        >>> sum(p.numel() for p in build_llama("7b", device="meta").parameters())
        6738415616
    """
    with torch.device(device or "cpu"):
        return LlamaForCausalLM._from_config(llama_config(size, **overrides), dtype=dtype or torch.float32)
