"""The optimizer and the learning rate that a configuration asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from ... import optim
from ...int8_weight import is_int8
from ...registry import LAYERS, OptimizerEntry
from ...validation import nearest
from ..config.arguments import AnySettings, Config, DataArguments, Keywords, Method, MethodArguments, RunArguments
from ..config.checks import optimizer_entry
from ..errors import BadInput

# Keys of a configuration that reach an optimizer where it has them: those of a subspace only the matrices with a rank.
SUBSPACE_KEYS = ("update_proj_gap", "scale", "proj_type", "subspace_method")
MASK_KEYS = ("sparsity", "update_every", "drop_fraction", "t_end")
# What makes the group of target matrices of an optimizer without a rank.
MARKS = {"n", "m", "keep", "role"}


# ---- keys from a run, and from a model ------------------------------------------------------------------------------


def _adam_keys(run: RunArguments) -> dict[str, Any]:
    return {**_lion_keys(run), "eps": run.adam_epsilon}


def _lion_keys(run: RunArguments) -> dict[str, Any]:
    return {"lr": run.learning_rate, "betas": (run.adam_beta1, run.adam_beta2)}


def _adafactor_keys(run: RunArguments) -> dict[str, Any]:
    return {"lr": run.learning_rate, "relative_step": False, "scale_parameter": False}


def _torch_keys(run: RunArguments) -> dict[str, Any]:
    return {**_adam_keys(run), "fused": True}


def _heads(model: nn.Module, entry: OptimizerEntry) -> dict[str, Any]:
    """How many heads the attention matrices of a LLaMA have: GaLore+ shares a projector among them."""
    fields = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.dim() == 2 and p.requires_grad}
    return {"num_heads": {name: getattr(model.config, field) for name, field in fields.items() if name in trained}}


def _pattern(model: nn.Module, entry: OptimizerEntry) -> dict[str, Any]:
    """n and m, which the optimizer's layers have."""
    assert entry.layer is not None
    layer: Any = next(module for module in model.modules() if isinstance(module, LAYERS[entry.layer].cls))
    return {"n": layer.n, "m": layer.m}


def _roles(model: nn.Module, entry: OptimizerEntry) -> dict[str, Any]:
    """What each matrix is for comes from the model's modules."""
    return {"role": "auto"}


RUN_KEYS = {"adam": _adam_keys, "lion": _lion_keys, "adafactor": _adafactor_keys, "torch": _torch_keys}
MODEL_KEYS: dict[str, Callable[[nn.Module, OptimizerEntry], dict[str, Any]]] = {
    "heads": _heads,
    "pattern": _pattern,
    "roles": _roles,
}


def run_keys(entry: OptimizerEntry, run: RunArguments) -> dict[str, Any]:
    """The keys that an optimizer takes from a run's arguments, such as the learning rate."""
    return RUN_KEYS[entry.run_keys](run)


# ---- building -------------------------------------------------------------------------------------------------------


def build_optimizer(model: nn.Module, chosen: MethodArguments, run: RunArguments) -> torch.optim.Optimizer:
    """The optimizer of a run on ``model``'s trainable parameters.

    Raises:
        BadInput: for an unknown name, a key or value the optimizer refuses or a pattern that matches no layer.
    """
    entry = optimizer_entry(chosen.optimizer)
    keywords = _keywords(entry, chosen)
    try:
        rank = chosen.rank if "rank" in entry.accepts() else None
        marks = _marks(entry, model, chosen) if rank is None else _subspace_keys(entry, model, chosen, keywords)
        groups = optim.param_groups(model, rank, chosen.target_modules, weight_decay=run.weight_decay, **marks)
        keywords = {**_mask_keys(entry, chosen, run), **keywords}
        if any(map(is_int8, model.parameters())):
            keywords.setdefault("stochastic_rounding", True)  # to nearest, small updates would be lost
        build: Callable[..., torch.optim.Optimizer] = entry.cls
        return build(groups, **{**run_keys(entry, run), **_clocks(entry, run, keywords), **keywords})
    except (ValueError, ImportError) as error:
        raise BadInput(_spelt(str(error), entry)) from None


def _spelt(message: str, entry: OptimizerEntry) -> str:
    """An optimizer's complaint, with the way to give a key of its own that a run has, too."""
    shared = entry.accepts() & {f.name for f in fields(DataArguments)}
    named = next((key for key in shared if re.search(rf"\b{key}\b", message)), None)
    return message if named is None else f"{message} (the optimizer's own is --optimizer_args.{named})"


def _keywords(entry: OptimizerEntry, chosen: MethodArguments) -> dict[str, Any]:
    """``optimizer_args``, checked."""
    keywords = dict(chosen.optimizer_args or {})
    known = entry.accepts() - {"rank", *MARKS, *SUBSPACE_KEYS, *MASK_KEYS}
    for key in keywords:
        if key not in known:
            raise BadInput(f"optimizer_args: {chosen.optimizer} takes no {key!r} there; {nearest(key, known)}")
    if "state_dtype" in keywords:
        keywords["state_dtype"] = _dtype(keywords["state_dtype"])
    return keywords


def _dtype(name: Any) -> torch.dtype | None:
    if name is None:
        return None
    known = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    if name not in known:
        raise BadInput(f"optimizer_args: unknown state_dtype {name!r}; choose one of {', '.join(known)}")
    return known[name]


def _marks(entry: OptimizerEntry, model: nn.Module, chosen: MethodArguments) -> dict[str, Any]:
    """The key that makes a group of the target matrices, for an optimizer without a rank; none where they are trained
    like all others."""
    if entry.accepts() & {"n", "role"}:
        return _model_keys(entry, model)
    if not entry.accepts() & {"sparsity", "keep"}:
        return {}
    if chosen.sparsity is None:
        raise BadInput(f"optimizer {chosen.optimizer} needs sparsity, the share of weights that are zero, such as 0.9")
    return {"keep": 1 - chosen.sparsity} if "keep" in entry.accepts() else {"sparsity": chosen.sparsity}


def _subspace_keys(
    entry: OptimizerEntry, model: nn.Module, chosen: MethodArguments, keywords: Mapping[str, Any]
) -> dict[str, Any]:
    given = {key: getattr(chosen, key) for key in SUBSPACE_KEYS}
    keys = {key: value for key, value in given.items() if value is not None and key in entry.accepts()}
    return keys | {key: value for key, value in _model_keys(entry, model).items() if key not in keywords}


def _model_keys(entry: OptimizerEntry, model: nn.Module) -> dict[str, Any]:
    return {} if entry.model_keys is None else MODEL_KEYS[entry.model_keys](model, entry)


def _mask_keys(entry: OptimizerEntry, chosen: MethodArguments, run: RunArguments) -> dict[str, Any]:
    given = {key: getattr(chosen, key) for key in MASK_KEYS if key != "sparsity"} | {"seed": run.seed}
    known = entry.accepts() if "sparsity" in entry.accepts() else set()
    return {key: value for key, value in given.items() if value is not None and key in known}


def _clocks(entry: OptimizerEntry, run: RunArguments, given: Mapping[str, Any]) -> dict[str, Any]:
    """Steps at which something ends, as shares of the run's, where they are not given."""
    missing = {key: share for key, share in entry.clocks.items() if key not in given}
    if missing and run.max_steps <= 0:
        key, share = next(iter(missing.items()))
        raise BadInput(f"{key} is {share:g} of max_steps by default; give one of the two")
    return {key: max(1, round(share * run.max_steps)) for key, share in missing.items()}


def with_optimizer(chosen: Method, optimizer: str) -> Method:
    """The same choice with another optimizer, and those of its further keywords that this one takes."""
    if optimizer == chosen.optimizer:
        return chosen
    known = optimizer_entry(optimizer).accepts()
    taken = {key: value for key, value in (chosen.optimizer_args or {}).items() if key in known}
    return replace(chosen, optimizer=optimizer, optimizer_args=Keywords(taken))


def without_effect(config: Config) -> list[str]:
    """The keys of subspaces and masks that were given to a pretraining and that do nothing there."""
    return unused_keys(config, () if config.model.layer is None else ("rank", "target_modules"))


def unused_keys(config: AnySettings, elsewhere: Collection[str]) -> list[str]:
    """The keys of subspaces and masks that were given and that the chosen optimizer does not have; those of
    ``elsewhere`` are taken by something else."""
    accepted = optimizer_entry(config.optimizer.optimizer).accepts()
    present = accepted | set(elsewhere)
    present |= {"target_modules"} if accepted & {"rank", "sparsity", "keep"} else set()
    present |= {"sparsity"} if "keep" in accepted else set()
    named = ("rank", *SUBSPACE_KEYS, *MASK_KEYS, "target_modules")
    return [key for key in named if key in config.given and key not in present]


def jagged_schedule(config: Config, steps: int, optimizer: torch.optim.Optimizer) -> optim.JaggedCosineLR:
    """ReLoRA's learning rate over a run of ``steps``.

    Raises:
        BadInput: for restarts that do not fit into the run.
    """
    run, chosen = config.run, config.optimizer
    assert chosen.lr_restart_every is not None
    given = run.lr_scheduler_kwargs if isinstance(run.lr_scheduler_kwargs, dict) else {}
    least = given.get("min_lr_rate", 0.1)
    try:
        return optim.JaggedCosineLR(
            optimizer, steps, run.get_warmup_steps(steps), chosen.lr_restart_every, chosen.lr_restart_warmup, least
        )
    except ValueError as error:  # which names the class's arguments, not a configuration's keys
        message = str(error).replace("restart_warmup_steps", "lr_restart_warmup")
        raise BadInput(message.replace("restart_every", "lr_restart_every").replace("lr_lr_", "lr_")) from None
