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

    Raises:
        ValueError: for an unknown size or field, or dimensions that do not fit each other.
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
    """A freshly initialised model of ``size`` on ``device`` (``"meta"`` allocates nothing) in ``dtype`` (fp32)."""
    with torch.device(device or "cpu"):
        return LlamaForCausalLM._from_config(llama_config(size, **overrides), dtype=dtype or torch.float32)
