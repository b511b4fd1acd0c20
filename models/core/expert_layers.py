"""Experts that a model keeps in one tensor (E, m, n), as E layers from which that tensor is made.

    experts.gate_up_proj          (E, m, n), made when it is read, once in a forward pass
    experts.gate_up_proj_layers   the E layers: their parameters and buffers are the model's

The module stays what it is, of a class derived from its own, and reads its tensors as before: in a loop over experts or
all at once. Memory: where a module has weights of E m n elements, so has each of its passes, as wide as the parameters,
and twice for a moment. Autograd keeps them until the backward pass has been through the module, where their gradient is
as large again for a moment. What is saved for good are gradients and moments. With activations checkpointed, weights
and gradients of this size are there for one module at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .factored_linear import FactoredLinear

_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[FactoredExperts]] = {}


class ExpertLayers(nn.ModuleList):
    """The layers of E experts.

    Args:
        layers: one for each expert, alike and without a bias.
        tensor: the name of the parameter that they stand for, in the module that they are put into.
        transposed: whether it is (E, in, out), and not (E, out, in).
    """

    def __init__(self, layers: Iterable[FactoredLinear], tensor: str, transposed: bool) -> None:
        super().__init__(layers)
        self.tensor_replaced, self.transposed = tensor, transposed

    def each(self) -> Iterator[FactoredLinear]:
        """The layers."""
        for layer in self:
            assert isinstance(layer, FactoredLinear)
            yield layer

    def weight(self) -> Tensor:
        """The tensor, computed now, with a way back to the layers' parameters. As wide as they are, also under
        autocast: what reads it rounds it."""
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self._stacked(layer.trained_weight() for layer in self.each())

    def merged(self) -> nn.Parameter:
        """The parameter that computes the same."""
        return nn.Parameter(self._stacked(layer.dense() for layer in self.each()))

    def _stacked(self, weights: Iterable[Tensor]) -> Tensor:
        return torch.stack([W.mT if self.transposed else W for W in weights])


class FactoredExperts(nn.Module):
    """What ``put`` mixes into the class of a module with experts: their tensors are made from layers.

    Attributes:
        replaced: the class of the module before.
        tensors: the names of what is made.
    """

    replaced: ClassVar[type[nn.Module]]
    tensors: ClassVar[tuple[str, ...]]

    def forward(self, *args: Any, **keywords: Any) -> Any:
        # a loop over experts reads the whole tensor for each; what a pass reads first may be read without gradients
        self.__dict__["_made"] = {}, torch.is_grad_enabled()
        try:
            return super().forward(*args, **keywords)
        finally:
            self.__dict__.pop("_made", None)  # also where checkpointing ends a pass that is done again

    def layers_of(self, tensor: str) -> ExpertLayers:
        """The layers that stand for a tensor."""
        layers = self._modules[layers_name(tensor)]
        assert isinstance(layers, ExpertLayers)
        return layers

    def _tensor(self, name: str) -> Tensor:
        made, with_gradients = self.__dict__.get("_made", ({}, torch.is_grad_enabled()))
        if name not in made:
            with torch.set_grad_enabled(with_gradients):
                made[name] = self.layers_of(name).weight()
        found: Tensor = made[name]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copies and pickles: the class itself cannot be found by its name
        return _empty, (type(self).replaced, type(self).tensors), self.__dict__


def layers_name(tensor: str) -> str:
    """What the layers that stand for a tensor are called, beside it."""
    return f"{tensor}_layers"


def put(module: nn.Module, layers: Mapping[str, ExpertLayers]) -> None:
    """Let ``layers`` stand for the parameters of ``module`` of their names."""
    replaced: type[nn.Module] = type(module)
    before: tuple[str, ...] = ()
    if isinstance(module, FactoredExperts):
        replaced, before = module.replaced, module.tensors
    module.__dict__.setdefault("_order", tuple(module._parameters))
    for name, those in layers.items():
        del module._parameters[name]
        module.add_module(layers_name(name), those)
    module.__class__ = _class(replaced, (*before, *layers))


def take_out(module: FactoredExperts, tensors: Mapping[str, nn.Parameter]) -> None:
    """Give ``module`` its class and its parameters back, in their order."""
    for name in type(module).tensors:
        del module._modules[layers_name(name)]
    module.__class__ = type(module).replaced  # type: ignore[assignment]
    held = {**module._parameters, **tensors}
    order = {name: held[name] for name in module.__dict__.pop("_order") if name in held}
    module._parameters.clear()
    module._parameters.update(order | held)


def _class(replaced: type[nn.Module], tensors: tuple[str, ...]) -> type[FactoredExperts]:
    """Of the same name: wrappers look for modules by it."""
    key = replaced, tensors
    if key not in _classes:
        told = {"replaced": replaced, "tensors": tensors, "__module__": replaced.__module__}
        made = {name: _property(name) for name in tensors}
        _classes[key] = type(replaced.__name__, (FactoredExperts, replaced), {**told, **made})
    return _classes[key]


def _property(name: str) -> property:
    def made(self: FactoredExperts) -> Tensor:
        return self._tensor(name)

    return property(made)


def _empty(replaced: type[nn.Module], tensors: tuple[str, ...]) -> FactoredExperts:
    kind = _class(replaced, tensors)
    return kind.__new__(kind)
