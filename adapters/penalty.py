"""Terms of the loss that a method adds for its tensors, without a Trainer of its own: by a hook of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import AdapterConfig
from .layer import AdapterLayer

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
        layer.penalty(layer.settings[adapter], **{key: _whole(value) for key, value in layer.tensors(adapter).items()})
        for layer in adapter_layers(model)
        for adapter in layer.active_adapters
        if layer.has(adapter) and not layer.disable_adapters
    ]
    held = [term for term in terms if term is not None]
    return torch.stack(held).mean() if held else None


def _whole(tensor: Tensor) -> Tensor:
    """A parameter that FSDP2 has split, gathered: each process adds the same term, whose mean is that term."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


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
