"""An adapter written as an ordinary LoRA, exactly: its own thin factors, no decomposition of m x n matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file

from .experts import ExpertsLayer, expert_factors
from .layer import AdapterLayer, LowRankLayer


@torch.no_grad()
def to_lora(model: PeftModel, folder: str | Path, adapter: str = "default") -> LoraConfig:
    """Write an adapter as peft's LoRA, which peft and servers of LoRA load without gracile.

    Args:
        model: with an adapter whose change of each weight is of low rank.
        folder: gets adapter_config.json and adapter_model.safetensors.

    Returns:
        The configuration that was written. Its rank is that of the change, which is 2 r where a method begins by taking
        its factors off the weight.

    Raises:
        ValueError: for an adapter that there is not, or whose change is of full rank.
    """
    named = model.named_modules()
    held = {name: layer for name, layer in named if isinstance(layer, AdapterLayer) and layer.has(adapter)}
    if not held:
        known = ", ".join(model.peft_config)
        raise ValueError(f"adapter must be one that the model has ({known}), got {adapter!r}")
    ranks: dict[str, int] = {}
    experts: list[str] = []
    weights = {}
    for name, layer in held.items():
        if not isinstance(layer, LowRankLayer):
            kind = type(model.peft_config[adapter]).__name__
            raise ValueError(
                f"{kind} changes weights by matrices of full rank, which no LoRA holds; merge_and_unload it"
            )
        if isinstance(layer, ExpertsLayer):
            left, right = expert_factors(layer, adapter)
            experts.append(layer.name)
            ranks[layer.name] = left.shape[-1]
            right, left = right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)  # as peft lays experts out
        else:
            left, right = layer.lora_factors(adapter)
            ranks[layer.name] = left.shape[1]
        weights[f"{name}.lora_A.weight"] = right.contiguous().cpu()
        weights[f"{name}.lora_B.weight"] = left.contiguous().cpu()
    own = f".{model.base_model.prefix}"
    weights |= {
        key: value for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items() if own not in key
    }
    config = _written(model, adapter, ranks, experts)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return config


def _written(model: PeftModel, adapter: str, ranks: dict[str, int], experts: list[str]) -> LoraConfig:
    own: Any = model.peft_config[adapter]
    rank = max(ranks.values())
    others = {name: r for name, r in ranks.items() if r != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_dropout=0.0 if experts else own.dropout,
        target_modules=[name for name in ranks if name not in experts],
        target_parameters=experts or None,
        modules_to_save=own.modules_to_save,
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
        inference_mode=True,
    )
