"""Terms of the loss that a method adds for its tensors, without a Trainer of its own: by a hook of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import AdapterConfig
from .gathering import is_away, whole
from .layer import AdapterLayer, Tensors

OF_THE_LOSS = ("labels", "num_items_in_batch", "shift_labels")  # what a model is given for its loss alone


def adapter_layers(model: nn.Module) -> Iterator[AdapterLayer]:
    """The layers of a model that have adapters of this package."""
    return (module for module in model.modules() if isinstance(module, AdapterLayer))


def penalty(model: nn.Module) -> Tensor | None:
    """The mean over layers and active adapters of the methods' own terms, weighted; None where there are none.

    A model adds it to its loss by itself, in training, where it returns one. A script that computes the loss (label
    smoothing, ``compute_loss_func``) adds it there.
    """
    terms = [
        layer.penalty(layer.settings[adapter], **_all_of(layer, adapter))
        for layer in adapter_layers(model)
        for adapter in layer.active_adapters
        if layer.has(adapter) and not layer.disable_adapters and type(layer).penalty is not AdapterLayer.penalty
    ]
    held = [term for term in terms if term is not None]
    return torch.stack(held).mean() if held else None


def _all_of(layer: AdapterLayer, adapter: str) -> Tensors:
    """What a term is made of. Under FSDP2 each process adds the same term, and the mean of gradients keeps it."""
    return {key: _read(layer, value) for key, value in layer.tensors(adapter).items()}


def _read(layer: AdapterLayer, tensor: Any) -> Tensor:
    if is_away(tensor):
        raise ValueError(
            f"a term of {layer.name}'s loss needs all of its factors, and ZeRO 3 has split them; set "
            f"stage3_param_persistence_threshold to at least {tensor.ds_numel}, or use ZeRO 2"
        )
    return whole(tensor)


def add_penalty(model: nn.Module, args: Any, keywords: Mapping[str, Any], outputs: Any) -> Any:
    """A forward hook of the base model: ``PeftModel`` without a task type passes its tuner by."""
    loss = outputs.get("loss") if hasattr(outputs, "get") else None
    if loss is None or not (model.training and torch.is_grad_enabled()):
        return outputs
    for term in (penalty(model), of_outputs(model, args, keywords, outputs)):
        if term is not None:
            outputs["loss"] = outputs["loss"] + term.to(loss) * _share(keywords)
    return outputs


def of_outputs(model: nn.Module, args: Any, keywords: Mapping[str, Any], outputs: Any) -> Tensor | None:
    """The terms that active adapters have on the model's outputs; None where there are none."""
    active = {
        adapter: layer.settings[adapter]
        for layer in adapter_layers(model)
        for adapter in layer.active_adapters
        if layer.has(adapter) and not layer.disable_adapters
    }
    asking = [config for config in active.values() if type(config).of_outputs is not AdapterConfig.of_outputs]
    if not asking:
        return None
    base = base_logits(model, args, keywords) if any(config.reads_base for config in asking) else None
    terms = [config.of_outputs(outputs["logits"], base, keywords.get("labels")) for config in asking]
    held = [term for term in terms if term is not None]
    return torch.stack(held).sum() if held else None


@torch.no_grad()
def base_logits(model: nn.Module, args: Any, keywords: Mapping[str, Any]) -> Tensor:
    """What the model puts out with its adapters switched off, and without dropout."""
    layers = [layer for layer in adapter_layers(model) if not layer._disable_adapters]
    training = [module for module in model.modules() if module.training]
    given = {key: value for key, value in keywords.items() if key not in OF_THE_LOSS}
    try:
        for layer in layers:
            layer._disable_adapters = True
        for module in training:
            module.training = False
        logits: Tensor = model(*args, **given).logits
        return logits
    finally:
        for layer in layers:
            layer._disable_adapters = False
        for module in training:
            module.training = True


def _share(keywords: Mapping[str, Any]) -> Tensor | float:
    """The Trainer divides a loss by the tokens of all passes of a step: each brings its share of the term."""
    total, shifted, labels = (keywords.get(key) for key in ("num_items_in_batch", "shift_labels", "labels"))
    counted = shifted if shifted is not None else labels[..., 1:] if labels is not None else None
    return 1.0 if total is None or counted is None else (counted != -100).sum() / total
