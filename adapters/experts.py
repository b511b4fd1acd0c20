"""Experts in one tensor (E, m, n) with adapters: each is a matrix of its own to a method, and all are one batch.

transformers' mixtures have them as a parameter of a module that multiplies by it inside of its forward. So what changes
is the tensor that the module reads: W + s delta, E x m x n for the length of a pass, as peft's LoRA has it for
``target_parameters``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .config import AdapterConfig
from .gathering import is_away
from .layer import AdapterLayer, LowRankLayer, Tensors


class ExpertsLayer(AdapterLayer):
    """The part of an adapter's layer that is other for experts; ``experts_layer`` puts it before a method's."""

    def __init__(self, base_layer: nn.Module, *args: Any, parameter_name: str, **keywords: Any) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, *args, **keywords)

    @property
    def is_turned(self) -> bool:
        """Whether a matrix is stored in x out, as gpt-oss has it."""
        return bool(getattr(self.get_base_layer(), "is_transposed", False))

    @property
    def parameter(self) -> nn.Parameter:
        base: Any = self.get_base_layer()
        if parametrize.is_parametrized(base, self.parameter_name):
            base, name = base.parametrizations[self.parameter_name], "original"
        else:
            name = self.parameter_name
        held: nn.Parameter = getattr(base, name)
        return held

    def sides(self) -> tuple[int, int]:
        shape = getattr(self.parameter, "ds_shape", self.parameter.shape)
        if len(shape) != 3:
            raise ValueError(
                f"target_parameters must name experts (E, m, n), got {self.name} of shape {tuple(shape)}; linear "
                "layers go into target_modules"
            )
        m, n = shape[1:] if not self.is_turned else (shape[2], shape[1])
        return n, m

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        return self.parameter.device, self.parameter.dtype

    def _base_weight(self) -> Tensor:
        return self.parameter.data  # whose version is its own: it is saved for backward

    def _write_base(self, weight: Tensor) -> None:
        self.parameter.data = weight

    def _turned(self, experts: Tensor) -> Tensor:
        return experts.mT if self.is_turned else experts

    def wide_weight(self) -> Tensor:
        return self._turned(self._base_weight() if self._unmerged is None else self._unmerged).float()

    def started(self, config: AdapterConfig, r: int) -> Tensors:
        each = [self.start(own, config, r) for own in self.wide_weight()]
        return {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}

    def all_shapes(self, config: AdapterConfig, r: int) -> dict[str, tuple[int, ...]]:
        return {name: (len(self.parameter), *shape) for name, shape in self.shapes(config, r).items()}

    def whole_delta(self, adapter: str) -> Tensor:
        """s delta of an adapter (E x m x n)."""
        config, tensors = self.settings[adapter], self.tensors(adapter)
        delta = torch.func.vmap(lambda weight, own: self.delta(weight, config, **own))(self.wide_weight(), tensors)
        return delta * self.scale(adapter)

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self._turned(self.whole_delta(adapter))

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if self.has(a)]
        if not active:
            return self.base_layer(x, *args, **keywords)
        if is_away(self.parameter):
            raise ValueError(f"ZeRO 3 has split {self.name}; adapters of experts need all of it, use ZeRO 2 or FSDP2")
        with self._with(sum(self.get_delta_weight(adapter) for adapter in active)):
            return self.base_layer(x, *args, **keywords)

    @contextmanager
    def _with(self, change: Any) -> Iterator[None]:
        """The module reads its parameter with the change added."""
        base = self.get_base_layer()
        trained = self.parameter.requires_grad
        parametrize.register_parametrization(base, self.parameter_name, _Added(change), unsafe=True)
        self.parameter.requires_grad_(trained)
        try:
            with parametrize.cached():
                yield
        finally:
            parametrize.remove_parametrizations(base, self.parameter_name, leave_parametrized=False)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Of all parameters of the module that have adapters: a layer for each, one in another."""
        layer: nn.Module = self
        while isinstance(layer, AdapterLayer):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer


class _Added(nn.Module):
    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.change = change

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.change.to(weight.dtype)


@cache
def experts_layer(kind: type[AdapterLayer]) -> type[ExpertsLayer]:
    """The class of a method's layers for experts. peft finds such a layer again by the name of its class.

    Raises:
        ValueError: for a method that has no adapters of experts.
    """
    if not kind.adapts_experts:
        raise ValueError(f"target_parameters: {kind.__name__.removesuffix('Layer')} has no adapters of experts")
    made: type[ExpertsLayer] = type("ParamWrapper", (ExpertsLayer, kind), {"__module__": kind.__module__})
    return made


def expert_factors(layer: ExpertsLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """lora_B (E x m x k), which has the scale, and lora_A (E x k x n) of a change of low rank."""
    assert isinstance(layer, LowRankLayer)
    config = layer.settings[adapter]
    left, right = torch.func.vmap(lambda own: layer.factors(config, **own))(layer.tensors(adapter))
    return left * layer.scale(adapter), right
