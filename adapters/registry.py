"""Puts a method where peft looks for its own: three dictionaries, keyed by a member of a str-Enum that is not peft's.

peft's PeftType is a str-Enum, whose members hash and compare as their text, and so do ours: peft's own stays as it is.
Two rules come from others: the key needs ``.value`` (transformers), and its text in lower case with "_" behind it must
be the prefix of the method's attributes (transformers' ``delete_adapter``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import AdapterConfig
from .layer import AdapterLayer
from .tuner import AdapterTuner

Layer = TypeVar("Layer", bound=type[AdapterLayer])
METHODS: dict[str, type[AdapterConfig]] = {}  # by name, those that were registered here


def register(method: Any, config: type[AdapterConfig]) -> Callable[[Layer], Layer]:
    """Make a layer class known to peft under ``method``, a member of a str-Enum in a module (else it does not pickle),
    with its configuration.

    Raises:
        ValueError: for a prefix that is not the method's name.
        KeyError: for a name that peft or somebody else has already.
    """

    def registered(layer: Layer) -> Layer:
        prefix = f"{method.value.lower()}_"
        if layer.prefix != prefix:
            raise ValueError(f"{layer.__name__}.prefix must be {prefix!r}, of its method, got {layer.prefix!r}")
        taken = PEFT_TYPE_TO_CONFIG_MAPPING.get(method)
        if taken is not None and taken is not config:
            raise KeyError(f"peft has a method {method.value} already: {taken.__module__}.{taken.__name__}")
        name = config.__name__.removesuffix("Config") + "Model"
        body = {"prefix": prefix, "tuner_layer_cls": layer, "__module__": layer.__module__, "__doc__": layer.__doc__}
        config.method = method
        PEFT_TYPE_TO_CONFIG_MAPPING[method] = config
        tuner = type(name, (AdapterTuner,), body)
        setattr(sys.modules[layer.__module__], name, tuner)  # where pickle looks for it
        PEFT_TYPE_TO_TUNER_MAPPING[method] = tuner
        PEFT_TYPE_TO_PREFIX_MAPPING[method] = prefix
        METHODS[method.value.lower()] = config
        return layer

    return registered
