"""What a run trains, before anything is allocated: a model and its optimizer, on the meta device.

``NewModel`` is that of a pretraining, ``TunedModel`` that of a fine-tuning; a plan asks them the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..config.arguments import DTYPES, AnySettings, Config
from ..config.checks import check_sizes, check_values, moves_int8_weights
from ..config.finetune_arguments import FinetuneConfig
from ..config.finetune_checks import check_finetune, refuse_split
from ..errors import BadInput
from .adapter import check_adapter
from .layers import layer_with, with_layer
from .model import architecture, untrained
from .optimizer import build_optimizer, with_optimizer
from .selected import build_selected, check_countable, check_selection
from .tuned_model import base_architecture, known_classes, planned_tuned, untrained_base

ORDINARY = "weights in dtype"  # the variant of an optimizer that does not move weights in 8 bits


def blank_batch(examples: int, tokens: int) -> dict[str, Tensor]:
    """The batch of a causal language model, of zeros."""
    seen = torch.zeros((examples, tokens), dtype=torch.long)
    return {"input_ids": seen, "labels": seen}


class Trainee(ABC):
    """What a configuration trains.

    Args:
        config: of a command that trains.

    Raises:
        BadInput: for one that no run could start with, or that cannot be planned.
    """

    architecture: PreTrainedConfig

    def __init__(self, config: AnySettings) -> None:
        self.settings = config

    @property
    def hidden_size(self) -> int:
        size: int = self.architecture.get_text_config().hidden_size
        return size

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, as they are loaded or made."""
        return DTYPES[self.settings.model.dtype]

    def variant(self, optimizer: str) -> str | None:
        """What ``optimizer`` changes of the model: the name of its layer, or ``ORDINARY``."""
        return None

    @abstractmethod
    def check_stage(self, stage: int) -> None:
        """Refuse a stage of ZeRO that a run could not have.

        Raises:
            BadInput: for such a stage.
        """

    @abstractmethod
    def model(self, variant: str | None, dtype: torch.dtype) -> PreTrainedModel:
        """A new one, whole, in which each parameter says whether it is trained."""

    @abstractmethod
    def optimizer(self, model: nn.Module, name: str) -> torch.optim.Optimizer:
        """That of the run, or another one in its place."""

    def batch(self, examples: int, tokens: int) -> dict[str, Tensor]:
        """What the model is given in a pass, of zeros."""
        return blank_batch(examples, tokens)

    @abstractmethod
    def parameters(self, model: nn.Module) -> int:
        """How many there are without adapters."""

    @property
    def part(self) -> str | None:
        """What of the model is trained, where it is not all."""
        return None


class NewModel(Trainee):
    """What ``gracile pretrain`` trains: a model, perhaps with layers of ours."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        check_values(config)
        if config.optimizer.teacher is not None:
            raise BadInput(f"teacher is {config.optimizer.teacher}, which is not planned; leave it out")
        self.config = config
        self.architecture = architecture(config.model)

    def variant(self, optimizer: str) -> str | None:
        if self.config.model.weight_bits is not None and not moves_int8_weights(optimizer):
            return ORDINARY
        return layer_with(self.config, optimizer)

    def check_stage(self, stage: int) -> None:
        """Any can be planned, but of weights in 8 bits."""
        if stage and self.config.model.weight_bits is not None:
            raise BadInput(f"weight_bits: 8 is not for DeepSpeed, got ZeRO {stage}; plan one process, or a stage of 0")

    def model(self, variant: str | None, dtype: torch.dtype) -> PreTrainedModel:
        if variant == ORDINARY:
            ordinary = replace(self.config.model, weight_bits=None)
            return untrained(replace(self.config, model=ordinary), self.architecture, dtype)
        return untrained(with_layer(self.config, variant), self.architecture, dtype)

    def optimizer(self, model: nn.Module, name: str) -> torch.optim.Optimizer:
        return build_optimizer(model, with_optimizer(self.config.optimizer, name), self.config.run)

    def parameters(self, model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())


class TunedModel(Trainee):
    """What ``gracile finetune`` trains: a saved model, an adapter on it, or a part of its weights.

    Of the model ``config.json`` is read, of a saved adapter ``adapter_config.json``, and of the data nothing.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        check_finetune(config, reads_data=False)
        check_adapter(config)
        check_selection(config)
        check_countable(config)
        self.config = config
        self.architecture = base_architecture(config)
        check_sizes(config, self.architecture)

    def check_stage(self, stage: int) -> None:
        refuse_split(self.config, stage)

    def model(self, variant: str | None, dtype: torch.dtype) -> PreTrainedModel:
        built = planned_tuned(self.config, self.architecture)
        if dtype != self.dtype:  # an engine has cast all of it
            for tensor in (*built.parameters(), *built.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
        return built

    def optimizer(self, model: nn.Module, name: str) -> torch.optim.Optimizer:
        chosen = replace(self.config, optimizer=with_optimizer(self.config.optimizer, name))
        check_finetune(chosen, reads_data=False)
        check_selection(chosen)
        return build_selected(model, chosen)

    def batch(self, examples: int, tokens: int) -> dict[str, Tensor]:
        given: dict[str, Any] = super().batch(examples, tokens)
        if self.config.data.packing:
            return given | {"position_ids": torch.zeros_like(given["input_ids"])}
        if self.config.classifies:
            given["labels"] = given["labels"][:, 0].clone()
        return given | {"attention_mask": torch.zeros_like(given["input_ids"])}

    def parameters(self, model: nn.Module) -> int:
        base = untrained_base(self.config, self.architecture, known_classes(self.architecture))
        return sum(p.numel() for p in base.parameters())

    @property
    def part(self) -> str | None:
        chosen = self.config.model
        named = chosen.adapter or chosen.selection
        if named is None and chosen.adapter_from is not None:
            named = f"the adapter of {chosen.adapter_from}"
        return None if named is None else f"{named} on 4 bits" if chosen.quantize is not None else named


def trainee_of(config: AnySettings) -> Trainee:
    """What ``config``, of any command that trains, trains.

    Raises:
        BadInput: for one that no run could start with, or that cannot be planned.
    """
    if isinstance(config, Config):
        return NewModel(config)
    assert isinstance(config, FinetuneConfig)
    return TunedModel(config)
