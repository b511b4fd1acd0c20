"""The layers that a configuration asks for: put into a model, and driven by their schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ...models.convert import convert
from ...models.layer_schedules.mask_decay import DECAYS, MaskDecay
from ...models.layer_schedules.protocol import LayerSchedule
from ...models.layers import FactoredLinear
from ...registry import LAYERS, OPTIMIZERS
from ..config.arguments import Config
from ..config.checks import accepted_keywords, optimizer_entry
from ..errors import BadInput
from . import loading


def check_saved(model: nn.Module, config: Config) -> None:
    """Refuse a run that would save no model: layers that do not merge are in its checkpoints alone.

    Raises:
        BadInput: for such a model without checkpoints to the end.
    """
    kept = config.run.save_strategy
    if not merges(model) and kept not in ("steps", "epoch"):
        raise BadInput(
            f"layer {config.model.layer} is not linear here and merges into no plain layer: its model is the last "
            f"checkpoint; save_strategy must be steps or epoch, got {getattr(kept, 'value', kept)}"
        )


def merges(model: nn.Module) -> bool:
    """Whether ``model`` can be saved as one that loads without gracile."""
    return all(module.is_linear for module in model.modules() if isinstance(module, FactoredLinear))


def layer_with(config: Config, optimizer: str) -> str | None:
    """The layer of a run in which ``optimizer`` takes the place of the configured one, to be compared with it."""
    needed, configured = optimizer_entry(optimizer).layer, config.model.layer
    if needed is not None:
        return needed
    trains_it = configured is None or optimizer in (LAYERS[configured].optimizers or OPTIMIZERS)
    return configured if trains_it else None


def with_layer(config: Config, layer: str | None) -> Config:
    """The same run with another layer, which then has its own defaults."""
    if layer == config.model.layer:
        return config
    return replace(config, model=replace(config.model, layer=layer, layer_args=None))


def converted(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """``model`` itself, with the layers that the configuration asks for, if it does.

    Raises:
        BadInput: for a value that the layer refuses, or a pattern that matches nothing.
    """
    if config.model.layer is None:
        return model
    entry = LAYERS[config.model.layer]
    accepted = accepted_keywords(entry.cls)
    keywords = {key: value for key, value in (config.model.layer_args or {}).items() if key in accepted}
    if "rank" in accepted and not entry.own_rank:
        keywords.setdefault("rank", config.optimizer.rank)
    if entry.takes_masks:
        keywords["sparsity"] = config.optimizer.sparsity
    if "seed" in accepted:
        keywords.setdefault("seed", config.run.seed)
    try:
        return convert(model, entry.cls, config.optimizer.target_modules, **keywords)
    except (ValueError, TypeError) as error:
        raise BadInput(f"layer {config.model.layer}: {error}") from None


def schedule_of(model: nn.Module, config: Config) -> LayerSchedule | None:
    """What changes the model's layers from step to step, if anything does. Masks are n:m at once, where no ``decay`` is
    given.

    Raises:
        BadInput: for a value that is refused, or one of a decay that is not given.
    """
    kind = None if config.model.layer is None else LAYERS[config.model.layer].schedule
    if kind is None:
        return None
    accepted = accepted_keywords(kind)
    given = {key: value for key, value in (config.model.layer_args or {}).items() if key in accepted}
    if kind is MaskDecay and given and "decay" not in given:
        raise BadInput(f"layer_args: {next(iter(given))} needs a decay; choose one of {', '.join(DECAYS)}")
    defaults = {"seed": config.run.seed, "decay": "none"}
    try:
        made: LayerSchedule = kind(model, **{k: v for k, v in defaults.items() if k in accepted} | given)
    except ValueError as error:
        raise BadInput(f"layer_args: {error}") from None
    return made


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """A checkpoint's weights into a model that has its layers already.

    Raises:
        BadInput: where they are not of these layers.
    """
    missing, unexpected = loading.load_weights(model, checkpoint)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    strange = [*unexpected, *(name for name in missing if name not in tied)]
    if strange:
        raise BadInput(f"{checkpoint} does not hold the weights of these layers: {strange[0]} is on one side only")
