"""A model of random weights that is never there in more than 8 bits, but for one layer.

Its weights are those of the ordinary model of the same seed, in 8 bits. That one's are drawn twice: by the constructors
of torch, and then by transformers, part of a model at a time; here all is drawn once more to know where each layer's
numbers begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from .int8 import GROUP, KINDS, quantize_weights

Built = TypeVar("Built", bound=PreTrainedModel)
Draw = tuple[nn.Module, bool]  # a layer, and whether what it draws is what it has in the end


def build_int8(build: Callable[[], Built], group_size: int = GROUP) -> Built:
    """What ``build`` makes, with its weights in 8 bits as ``quantize_weights`` makes them, layer by layer.

    Args:
        build: makes a model of new weights on the CPU.
        group_size: weights of a row that share a scale.

    Raises:
        ValueError: as ``quantize_weights``.

    Example:
        >>> from gracile.models import build_llama
        >>> from gracile.models.int8_untrained import build_int8
        >>> model = build_int8(lambda: build_llama("2m", num_hidden_layers=1))
        >>> model.lm_head
        Int8Linear(in_features=128, out_features=4096, bias=False)
    """
    with init_empty_weights(include_buffers=False), _noted() as draws:
        model = build()
    model.tie_weights()  # which are two in what has no memory
    begins: dict[nn.Module, Tensor] = {}
    for layer, is_last in draws:
        if is_last:
            begins[layer] = torch.get_rng_state()
        _draw(layer, model, is_last)
    drawn = torch.get_rng_state()

    def initialize(layer: nn.Module) -> None:
        torch.set_rng_state(begins[layer])
        _draw(layer, model, is_last=True, keep=True)

    for layer in model.modules():
        if type(layer) not in KINDS and any(p.is_meta for p in layer.parameters(recurse=False)):
            initialize(layer)
    made = quantize_weights(model, group_size=group_size, initialize=initialize)
    torch.set_rng_state(drawn)
    return made


@contextmanager
def _noted() -> Iterator[list[Draw]]:
    """Which layers draw numbers while a model is built, in this order."""
    draws: list[Draw] = []
    given: Any = PreTrainedModel._initialize_weights

    def initialize(model: PreTrainedModel, module: nn.Module, *rest: Any) -> None:
        if not getattr(module, "_is_hf_initialized", False) and any(True for _ in module.parameters(recurse=False)):
            draws.append((module, True))
        given(model, module, *rest)

    def construct(layer: nn.Module) -> None:
        draws.append((layer, False))

    with (
        patch.object(PreTrainedModel, "_initialize_weights", initialize),
        patch.object(nn.Linear, "reset_parameters", construct),
        patch.object(nn.Embedding, "reset_parameters", construct),
    ):
        yield draws


def _draw(layer: nn.Module, model: PreTrainedModel, is_last: bool, keep: bool = False) -> None:
    """The numbers of a layer without memory, which are let go unless they are to be kept."""
    before = dict(layer._parameters)
    layer.to_empty(device="cpu", recurse=False)
    if is_last:
        model._init_weights(layer)
    else:
        layer.reset_parameters()  # type: ignore[operator]
    if not keep:
        layer._parameters.update(before)
