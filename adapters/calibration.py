"""Statistics of the base model's gradients on some batches, for methods that start from them: one pass, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import AdapterConfig


def calibrate(model: nn.Module, config: AdapterConfig, batches: Iterable[Mapping[str, Any]]) -> AdapterConfig:
    """``config`` itself, with what its method needs to know of the model's gradients.

    Args:
        model: the base model, before ``get_peft_model``; nothing in it changes. Its dropout is off in the pass.
        config: of a method that asks for it; its targets are looked at.
        batches: what the model is called with, labels among them, on its device. A gradient is that of a batch's loss.

    Raises:
        ValueError: for a method that needs no calibration, for no batches, or a batch without a loss.
    """
    if not hasattr(config, "statistic"):
        raise ValueError(f"{type(config).__name__} starts from the weights alone and is not calibrated")
    layers = {
        name: layer for name, layer in model.named_modules() if _is_linear(layer) and _is_target(model, config, name)
    }
    if not layers:
        raise ValueError(f"target_modules must name linear layers of the model, got {config.target_modules!r}")
    sums: dict[str, Tensor] = {}
    count = 0
    with _in_evaluation(model), _watched(layers, lambda name, G: _add(sums, name, config.statistic(G))):
        for batch in batches:
            with torch.enable_grad():
                loss = model(**batch).loss
            if loss is None:
                raise ValueError("batches must have labels, for the model returned no loss")
            loss.backward()
            count += 1
    if not count:
        raise ValueError("batches must hold at least one batch, got none")
    config.statistics = {name: total / count for name, total in sums.items()}
    config.calibrated = True
    return config


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = value.cpu() if name not in sums else sums[name].add_(value.cpu())


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, Conv1D))


def _is_target(model: nn.Module, config: AdapterConfig, name: str) -> bool:
    if config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        if kind not in known:
            raise ValueError(f"target_modules must be given, for a model of type {kind!r} has no usual ones")
        config.target_modules = set(known[kind])
    return bool(check_target_module_exists(config, name))


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout and without gradients of parameters, which stay what they were."""
    was, held = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    for p, _ in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        model.train(was)
        for p, required in held:
            p.requires_grad_(required)


@contextmanager
def _watched(layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """The gradient of each layer's weight (m x n, fp32) given to ``take`` as backward comes by, and never kept: the
    weights, which may be quantized, need no gradients."""

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].detach()
            output = output if output.requires_grad else output.requires_grad_()
            output.register_hook(lambda grad: take(name, _flat(grad).mT @ _flat(x)))
            return output

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten(0, -2).float()
