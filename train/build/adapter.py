"""Adapters of a fine-tuning: peft's, and those that gracile.adapters puts beside them, by their names there."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints

from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ...target_modules import reason_against, targets
from ...validation import nearest
from ..config.finetune_arguments import FinetuneConfig
from ..data.examples import Collator
from ..data.tuning import TuningData
from ..errors import BadInput
from ..sources import source_of
from .calibration import OFF_THE_BASE, is_calibrated, put_on

# Fields of a configuration of peft that other keys say, with the key, or that are the library's own to set.
SAID_BY = {"target_modules": "target_modules"}
SET_HERE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "calibrated",
}  # fmt: skip
# Fields of a LoRA that do not double with its rank.
NOT_OF_TWICE_THE_RANK = {
    "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "trainable_token_indices",
}  # fmt: skip


def methods() -> dict[str, type[Any]]:
    """The configuration of each method, by its name in lower case.

    Raises:
        BadInput: where peft is not installed.
    """
    if find_spec("peft") is None:
        raise BadInput("adapter needs peft, which is not installed; install it with: pip install peft")
    ours = f"{__package__.split('.')[0]}.adapters"
    if find_spec(ours) is not None:
        importlib.import_module(ours)  # which puts its methods beside peft's
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def method_of(name: str) -> type[Any]:
    """The configuration class of a method.

    Raises:
        BadInput: for an unknown name.
    """
    known = methods()
    if name not in known:
        raise BadInput(f"unknown adapter {name!r}; {nearest(name, known)}")
    return known[name]


def check_adapter(config: FinetuneConfig) -> None:
    """Refuse an adapter that is not known, fields that it has not, and keys that do not go together.

    Raises:
        BadInput: for the first of them.
    """
    chosen = config.model
    if chosen.adapter is not None and chosen.adapter_from is not None:
        raise BadInput("adapter and adapter_from are both given: a saved adapter has its own method; leave one out")
    if chosen.adapter is None:
        if config.data.calibration_examples is not None:
            raise BadInput("calibration_examples need an adapter that starts from gradients, such as --adapter lorasb")
        if chosen.adapter_args is not None:
            raise BadInput(f"adapter_args {chosen.adapter_args} need an adapter, such as --adapter lora")
        if chosen.adapter_from is not None:
            methods()
            source_of("adapter_from", chosen.adapter_from)
        return
    kind = method_of(chosen.adapter)
    given: dict[str, Any] = chosen.adapter_args or {}
    if config.data.calibration_examples is not None and not is_calibrated(kind, given):
        raise BadInput(f"calibration_examples has no effect with adapter {chosen.adapter}, which starts from weights")
    known = {f.name for f in dataclasses.fields(kind) if f.init} - SET_HERE
    for key in given:
        if key in SAID_BY:
            raise BadInput(f"adapter_args: {key} is a key of the run, as in --{SAID_BY[key]} q_proj v_proj")
        if key not in known:
            raise BadInput(f"adapter_args: {chosen.adapter} takes no {key!r}; {nearest(key, known - set(SAID_BY))}")
        _check_within(kind, key, given[key])
    _check_engine(config, given)
    _check_beginning(config, kind, given)


def _check_engine(config: FinetuneConfig, given: dict[str, Any]) -> None:
    """Refuse what must see whole factors in the optimizer's step, where an engine has split them."""
    if config.model.adapter == "allora" and config.run.deepspeed:
        raise BadInput(
            "adapter allora scales rows in the optimizer's step, and DeepSpeed steps flat copies; use FSDP2 or DDP"
        )
    if given.get("gradient_dropout") and (config.run.deepspeed or config.run.fsdp):
        raise BadInput("adapter_args: gradient_dropout gates whole gradients, which DeepSpeed and FSDP split; use DDP")


def _check_beginning(config: FinetuneConfig, kind: type[Any], given: dict[str, Any]) -> None:
    """Refuse what does not go with what an adapter finds in data, or with first factors that are taken off the base."""
    if is_calibrated(kind, given) and given.get("save_projection") is False:
        raise BadInput(
            f"adapter_args: save_projection: false leaves out what {config.model.adapter} finds in gradients, without "
            "which its adapter does not load; leave it out"
        )
    beginning = given.get("init_lora_weights")
    if beginning not in OFF_THE_BASE:
        return
    for key in sorted(NOT_OF_TWICE_THE_RANK & {key for key, value in given.items() if value}):
        raise BadInput(
            f"adapter_args: {key} does not go with init_lora_weights {beginning}, which is saved as a plain LoRA of "
            "twice the rank; leave one out"
        )
    if config.model.quantize is not None:
        raise BadInput(
            f"adapter_args: init_lora_weights {beginning} takes what it begins with off the base's weights, which "
            f"--quantize {config.model.quantize} does not let it; choose eva"
        )


def _check_within(kind: type[Any], key: str, value: Any) -> None:
    """Refuse what a configuration within a configuration has no field for: peft leaves it out without a word."""
    if not isinstance(value, dict):
        return
    for within in get_args(get_type_hints(kind)[key]):
        if dataclasses.is_dataclass(within):
            known = {f.name for f in dataclasses.fields(within) if f.init}
            for name in value.keys() - known:
                raise BadInput(f"adapter_args: {key} takes no {name!r}; {nearest(name, known)}")


def takes_targets(kind: type[Any]) -> bool:
    return "target_modules" in {f.name for f in dataclasses.fields(kind)}


def with_adapter(model: PreTrainedModel, config: FinetuneConfig, data: TuningData, collate: Collator) -> Any:
    """``model`` with the adapter that is trained; the model itself is frozen.

    Args:
        data: of which a method that starts from gradients sees some.

    Raises:
        BadInput: for what peft refuses, or a pattern that matches no layer.
    """
    import peft

    with _told(config):
        if config.model.adapter_from is not None:
            saved, local = _saved(config.model.adapter_from)
            return _without_allocation(peft.PeftModel.from_pretrained(model, saved, is_trainable=True, **local))
        adapter = _configured(model, config)
        return _without_allocation(put_on(model, adapter, config, data, collate))


def adapted_without_memory(model: PreTrainedModel, config: FinetuneConfig) -> Any:
    """The same of a model on the meta device: of a saved adapter its configuration is read, and of data nothing.

    Raises:
        BadInput: for the same, or a method of peft's that looks at weights when it is made.
    """
    import peft

    with _told(config):
        if config.model.adapter_from is not None:
            saved, local = _saved(config.model.adapter_from)
            adapter = peft.PeftConfig.from_pretrained(saved, **local)
            adapter.inference_mode = False
        else:
            adapter = _configured(model, config)
        if isinstance(getattr(adapter, "init_lora_weights", None), str):
            adapter.init_lora_weights = True  # factors of the same sizes, whatever they begin with
        try:
            return _without_allocation(peft.get_peft_model(model, adapter))
        except (NotImplementedError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"it looks at weights when it is made, so that it cannot be planned ({reason})") from None


@contextmanager
def _told(config: FinetuneConfig) -> Iterator[None]:
    """Whatever peft refuses in the block is one line that names the adapter."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, OSError) as error:
        named = config.model.adapter or config.model.adapter_from
        raise BadInput(f"adapter {named}: {' '.join(str(error).split()) or type(error).__name__}") from None


def _saved(adapter: str) -> tuple[str, dict[str, Any]]:
    """A saved adapter as peft is asked for it.

    Raises:
        ValueError: for one that is not beside the base as it is: peft loads LoRA-GA's without a word.
    """
    import peft

    methods()
    saved = source_of("adapter_from", adapter)
    local: dict[str, Any] = {} if saved.on_hub else {"local_files_only": True}
    beginning = getattr(peft.PeftConfig.from_pretrained(saved.name, **local), "init_lora_weights", None)
    if beginning in OFF_THE_BASE:
        raise ValueError(
            f"it began with init_lora_weights {beginning}, whose first factors are taken off the base and are not in "
            "it; give adapter/ of the run, which is one for the base as it is"
        )
    return saved.name, local


def _configured(model: PreTrainedModel, config: FinetuneConfig) -> Any:
    """The configuration of a new adapter."""
    import peft

    assert config.model.adapter is not None
    kind = method_of(config.model.adapter)
    given: dict[str, Any] = dict(config.model.adapter_args or {})
    if takes_targets(kind):
        given["target_modules"] = _shortened(layers_of(model, config.optimizer.target_modules), model)
    return kind(task_type=peft.TaskType.SEQ_CLS if config.classifies else peft.TaskType.CAUSAL_LM, **given)


def layers_of(model: PreTrainedModel, patterns: list[str]) -> list[str]:
    """The names of the linear layers that are adapted.

    Raises:
        ValueError: for a pattern that matches none.
    """
    names, unfit = [], {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not (isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit")):
            continue
        reason = reason_against(weight)
        if reason is None or hasattr(weight, "quant_state"):
            names.append(name)
        else:
            unfit[name] = reason
    return targets(model, patterns, names, unfit)


def _shortened(layers: list[str], model: PreTrainedModel) -> list[str]:
    """The last parts of the layers' names, where they are those of no other module; peft's own lists have such."""
    ends = {name.rpartition(".")[2] for name in layers}
    same = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends) if same == set(layers) else layers


def _without_allocation(model: Any) -> Any:
    """Refuse a method that moves ranks between steps: a resumed run would have lost by what."""
    if hasattr(model.base_model, "update_and_allocate"):
        raise ValueError("it moves ranks by what no checkpoint keeps, so that a run could not go on; choose another")
    return model


def merges(model: Any) -> bool:
    """Whether an adapter can be merged into the weights of its model."""
    return callable(getattr(getattr(model, "base_model", None), "merge_and_unload", None))


def step_callbacks(model: Any) -> list[TrainerCallback]:
    """What tells adapters of this package the Trainer's steps, which an engine's optimizer does not."""
    if not has_own_adapter(model):
        return []
    from ...adapters import StepCallback

    return [StepCallback()]


def has_own_adapter(model: Any) -> bool:
    """Whether it has an adapter of this package."""
    if find_spec("peft") is None or not has_adapter(model):
        return False
    from ...adapters import adapter_layers

    return any(True for _ in adapter_layers(model))


def has_adapter(model: Any) -> bool:
    """Whether it is a model of peft."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model")
