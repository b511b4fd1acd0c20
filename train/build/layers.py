"""Layers that store less, by the name that a configuration gives them."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ...models import layers
from ...models.convert import convert
from ...models.layer_schedules.gradient_annealing import GradientAnnealing
from ...models.layers import FactoredLinear, IsoFlopLinear
from ...models.layer_schedules.mask_decay import DECAYS, MaskDecay
from ...models.layer_schedules.ordered_dropout import OrderedDropout
from ...validation import nearest
from ..engines import layout as layouts
from ..config.arguments import Config, mapping
from ..errors import BadInput


class Kind(NamedTuple):
    """A class of layers. ``optimizers`` are those that care for it, where others would not train what is meant."""

    layer: type[FactoredLinear]
    optimizers: tuple[str, ...] = ()
    more: type[Any] | None = None  # what else takes keywords of ``layer_args``


MASKED = ("sparse_adamw", "set_adamw", "rigl_adamw", "srigl_adamw", "block_sparse_adamw")
LAYERS = {
    "low_rank": Kind(layers.LowRankLinear),
    "sltrain": Kind(layers.SparseLowRankLinear),
    "sst": Kind(layers.SpectralLinear, ("sst_adamw",)),
    "relora": Kind(layers.ReLoRALinear, ("relora_adamw",)),
    "maestro": Kind(layers.OrderedLowRankLinear, more=OrderedDropout),
    "autosparse": Kind(layers.ThresholdLinear, more=GradientAnnealing),
    "nm": Kind(layers.NMLinear, more=MaskDecay),
    "cast": Kind(layers.ScaledLinear, ("cast_adams",)),
    "parallel": Kind(layers.ParallelLinear, MASKED),
    "factorised": Kind(layers.FactorisedLinear, MASKED),
    "doped": Kind(layers.DopedLinear, MASKED),
}
# optimizers that are for one layer alone
FOR_LAYERS = {
    "sltrain_adamw": "sltrain",
    "sltrain_adamw_8bit": "sltrain",
    "sst_adamw": "sst",
    "relora_adamw": "relora",
    "sr_ste_adamw": "nm",
    "cast_adams": "cast",
}


def check(config: Config) -> None:
    """Refuse what does not go together, before anything is built.

    Raises:
        BadInput: for an unknown layer, an optimizer that does not care for it, a keyword that nothing takes, or a
            layout that the layer cannot be trained in.
    """
    name, optimizer = config.model.layer, config.optimizer.optimizer
    if FOR_LAYERS.get(optimizer, name) != name:
        raise BadInput(f"optimizer {optimizer} needs layer: {FOR_LAYERS[optimizer]}, got {name or 'none'}")
    if name is None:
        if config.model.layer_args is not None:
            raise BadInput(f"layer_args {config.model.layer_args} need a layer; choose one of {', '.join(LAYERS)}")
        return
    if name not in LAYERS:
        raise BadInput(f"unknown layer {name!r}; {nearest(name, LAYERS)}")
    kind = LAYERS[name]
    if kind.optimizers and optimizer not in kind.optimizers:
        raise BadInput(f"layer {name} needs optimizer: {' or '.join(kind.optimizers)}, got {optimizer}")
    known = _accepted(kind.layer) | (_accepted(kind.more) if kind.more else set())
    if issubclass(kind.layer, IsoFlopLinear):
        known -= {"sparsity"}  # the optimizer's: one number for both
        _check_first_masks(config)
    for key in _given(config):
        if key not in known:
            raise BadInput(f"layer_args: {name} takes no {key!r}; {nearest(key, known)}")
    layout = layouts.Layout.of(config.run)
    if name == "maestro" and (layout.engine == layouts.FSDP or layout.settings.get("stage") == 3):
        raise BadInput("layer maestro needs whole factors for its penalty, which ZeRO 3 and FSDP split; use ZeRO 2")
    learned = name == "autosparse" and _given(config).get("sparsity") is None
    if learned and config.model.dtype == "bfloat16" and layout.engine != layouts.DEEPSPEED:  # which keeps wider weights
        raise BadInput(
            "layer autosparse needs dtype: float32, for thresholds move by less than bfloat16 can hold; bf16: true "
            "computes in it all the same"
        )


def _check_first_masks(config: Config) -> None:
    chosen = config.optimizer
    default = 0.0 if chosen.optimizer == "block_sparse_adamw" else None
    start = mapping("optimizer_args", chosen.optimizer_args, "{}").get("initial_sparsity", default)
    if start is not None:
        raise BadInput(
            f"layer {config.model.layer} with initial_sparsity {start} is a larger dense model at first; give "
            'optimizer_args: {"initial_sparsity": null}'
        )


def check_saved(model: nn.Module, config: Config) -> None:
    """Refuse a run that would leave nothing: what does not merge is in its checkpoints alone.

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


def beside(config: Config, optimizer: str) -> str | None:
    """The layer that a run has when ``optimizer`` takes the place of the configured one, to be compared with it."""
    own = config.model.layer
    if optimizer in FOR_LAYERS:
        return FOR_LAYERS[optimizer]
    fits = own is None or not LAYERS[own].optimizers or optimizer in LAYERS[own].optimizers
    return own if fits else None


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
    kind, keys = LAYERS[config.model.layer], _accepted(LAYERS[config.model.layer].layer)
    given = {key: value for key, value in _given(config).items() if key in keys}
    if "rank" in keys and config.model.layer != "maestro":  # which has its own idea of a rank: all of it
        given.setdefault("rank", config.optimizer.rank)
    if issubclass(kind.layer, IsoFlopLinear):
        given["sparsity"] = config.optimizer.sparsity
    if "seed" in keys:
        given.setdefault("seed", config.run.seed)
    try:
        return convert(model, kind.layer, config.optimizer.target_modules, **given)
    except (ValueError, TypeError) as error:
        raise BadInput(f"layer {config.model.layer}: {error}") from None


def companion(model: nn.Module, config: Config) -> OrderedDropout | GradientAnnealing | MaskDecay | None:
    """What goes along with the model's layers from step to step, if anything does. Masks are n:m at once, where no
    ``decay`` is given.

    Raises:
        BadInput: for a value that is refused, or one of a decay that is not given.
    """
    kind = None if config.model.layer is None else LAYERS[config.model.layer].more
    if kind is None:
        return None
    keys = _accepted(kind)
    given = {key: value for key, value in _given(config).items() if key in keys}
    if kind is MaskDecay and given and "decay" not in given:
        raise BadInput(f"layer_args: {next(iter(given))} needs a decay; choose one of {', '.join(DECAYS)}")
    left = {"seed": config.run.seed, "decay": "none"}
    try:
        made: OrderedDropout | GradientAnnealing | MaskDecay = kind(
            model, **{**{key: value for key, value in left.items() if key in keys}, **given}
        )
    except ValueError as error:
        raise BadInput(f"layer_args: {error}") from None
    return made


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """A checkpoint's weights into a model that has its layers already.

    Raises:
        BadInput: where they are not of these layers.
    """
    held = {
        key: value for file in sorted(checkpoint.glob("model*.safetensors")) for key, value in load_file(file).items()
    }
    missing, unexpected = model.load_state_dict(held, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    strange = [*unexpected, *(name for name in missing if name not in tied)]
    if strange:
        raise BadInput(f"{checkpoint} does not hold the weights of these layers: {strange[0]} is on one side only")


def _given(config: Config) -> dict[str, Any]:
    return mapping("layer_args", config.model.layer_args, '{"density": 0.03}')


def _accepted(kind: Any) -> set[str]:
    return set(signature(kind).parameters) - {"in_features", "out_features", "bias", "name", "placed", "model"}
