"""The tuner of all methods: a method is a layer class and a configuration, and peft's verbs reach them through this."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from .experts import ExpertsLayer, experts_layer
from .layer import AdapterLayer
from .penalty import adapter_layers, add_penalty, warn_of_unfinished


class AdapterTuner(BaseTuner):
    """What peft calls a model of a method, such as ``LoraModel``."""

    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    tuner_layer_cls: type[AdapterLayer] = AdapterLayer
    steps: int
    model: nn.Module

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        own_parameter = parameter_name is None or getattr(target, "parameter_name", None) == parameter_name
        if isinstance(target, self.tuner_layer_cls) and own_parameter:
            target.update_layer(adapter_name, peft_config)
            return
        more = get_quantization_kwargs(self.model)
        shared = next((layer._shared_by_all for layer in adapter_layers(self.model)), {})
        if parameter_name is not None:
            kind = experts_layer(self.tuner_layer_cls)
            layer: AdapterLayer = kind(
                target, adapter_name, peft_config, current_key, shared, parameter_name=parameter_name, **more
            )
            self._put(parent, target_name, layer, target, adapter_name)
            return
        base: Any = getattr(target, "base_layer", target)
        if not (isinstance(base, (nn.Linear, Conv1D)) or hasattr(base, "quant_state")):
            raise ValueError(
                f"{type(peft_config).__name__} adapts linear layers, and {current_key} is a {type(base).__name__}; "
                "leave it out of target_modules, or name it in exclude_modules"
            )
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, current_key, shared, **more)
        self._put(parent, target_name, layer, target, adapter_name)

    def _put(self, parent: nn.Module, name: str, layer: AdapterLayer, target: nn.Module, adapter: str) -> None:
        if adapter not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ExpertsLayer) and not isinstance(new_module, AdapterLayer):
            setattr(parent, child_name, new_module)  # a module without the one weight that peft would hand on
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._post_injection_hook(model, config, adapter_name)
        if not hasattr(self, "steps"):
            self.steps = 0
            self.register_load_state_dict_post_hook(_tie)
            self._penalty_hook = model.register_forward_hook(add_penalty, with_kwargs=True)
            _tuners.add(self)

    def _unload_and_optionally_merge(self, *args: Any, **keywords: Any) -> Any:
        self._penalty_hook.remove()
        return super()._unload_and_optionally_merge(*args, **keywords)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **keywords: Any) -> Iterator[None]:
        if adapter_names is not None:  # which peft drops without a word where a tuner does not know them
            raise NotImplementedError(
                "one batch through several adapters needs LoRA; write them with gracile.adapters.to_lora first"
            )
        yield

    def step(self) -> None:
        """After a step of the optimizer; called by itself where that holds these parameters, else by a loop."""
        self.steps += 1
        for layer in adapter_layers(self.model):
            for adapter in layer.active_adapters:
                if layer.has(adapter):
                    layer.on_step(self.steps, adapter)


def _tie(tuner: AdapterTuner, _: Any) -> None:
    """What layers share, again: peft may have put a parameter of its own into each."""
    held: dict[tuple[str, str], nn.Parameter] = {}
    for layer in adapter_layers(tuner.model):
        for name in layer.shared:
            own = getattr(layer, layer.prefix + name)
            for adapter in own:
                own[adapter] = held.setdefault((adapter, name), own[adapter])
        layer._shared_by_all = held


_tuners: weakref.WeakSet[AdapterTuner] = weakref.WeakSet()


def _stepped_by(optimizer: Optimizer) -> list[AdapterTuner]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        tuner
        for tuner in _tuners
        if any(id(p) in held for layer in adapter_layers(tuner.model) for p in layer.parameters() if p.requires_grad)
    ]


def _before_step(optimizer: Optimizer, args: Any, keywords: Any) -> None:
    if _tuners:
        _prepare_step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, keywords: Any) -> None:
    if _tuners:
        _count_step(optimizer)


@torch.compiler.disable  # of a step that is compiled too
def _prepare_step(optimizer: Optimizer) -> None:
    for tuner in _stepped_by(optimizer):
        warn_of_unfinished(tuner.model)
        for layer in adapter_layers(tuner.model):
            for adapter in layer.active_adapters:
                if layer.has(adapter):
                    layer.before_step(tuner.steps + 1, adapter)


@torch.compiler.disable
def _count_step(optimizer: Optimizer) -> None:
    for tuner in _stepped_by(optimizer):
        tuner.step()


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


class StepCallback(TrainerCallback):
    """Counts the steps of methods that change with them where an optimizer's own hook does not: in a run that is
    resumed, and under DeepSpeed, whose optimizers hold flat copies."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **keywords: Any) -> None:
        for tuner in _tuners_of(model):
            tuner.steps = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **keywords: Any) -> None:
        for tuner in _tuners_of(model):
            if tuner.steps < state.global_step:
                tuner.step()


def _tuners_of(model: nn.Module) -> Iterator[AdapterTuner]:
    return (module for module in model.modules() if isinstance(module, AdapterTuner))
