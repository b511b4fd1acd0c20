"""A model of the meta device on fake tensors of a CPU, on which passes can be rehearsed."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...int8_weight import Int8Weight

AnyModel = TypeVar("AnyModel", bound=nn.Module)


def on_cpu(model: AnyModel) -> AnyModel:
    """``model`` itself, with every tensor empty on the CPU; called under fake tensors, where none has memory.
    ``Module.to_empty`` does not work there."""
    moved = _Moved()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module._parameters[name] = moved.parameter(p)
        for name, b in module.named_buffers(recurse=False):
            module._buffers[name] = moved.tensor(b)
        for name, value in vars(module).items():  # what is neither, as some methods of peft hold it
            vars(module)[name] = moved.held(value)
    return model


class _Moved:
    """What has been moved already, by identity: tied tensors stay tied. The old ones are kept beside the new: their
    identities may not go to others."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._parameters: dict[int, tuple[Any, Tensor]] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in self._tensors:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            self._tensors[id(tensor)] = (empty, tensor)
        return self._tensors[id(tensor)][0]

    def parameter(self, p: nn.Parameter) -> nn.Parameter:
        if id(p) not in self._parameters:
            made: Any = nn.Parameter(self._weight(p), requires_grad=p.requires_grad)
            state = getattr(p, "quant_state", None)
            if state is not None:
                made.quant_state = self._state(state)
                made.__class__ = type("Params4bit", (FakeTensor,), {})  # which peft knows by its name
            self._parameters[id(p)] = (made, p)
        found: nn.Parameter = self._parameters[id(p)][0]
        return found

    def _weight(self, p: Tensor) -> Tensor:
        if isinstance(p, Int8Weight):
            return p.like(self.tensor(p.codes), self.tensor(p.scales))
        return self.tensor(p)

    def held(self, value: Any) -> Any:
        """An attribute of a module: a tensor, or a dictionary with tensors."""
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return self.tensor(value)
        if isinstance(value, dict) and any(isinstance(one, Tensor) for one in value.values()):
            return {key: self.held(one) for key, one in value.items()}
        return value

    def _state(self, state: Any) -> Any:
        """That of a weight in 4 bits."""
        made = copy.copy(state)
        for name, value in vars(made).items():
            vars(made)[name] = self.tensor(value) if isinstance(value, Tensor) else value
        if made.nested:
            made.state2 = self._state(made.state2)
        return made
