"""Optimizers by the name that a configuration gives them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ... import optim
from ...models.layers import NMLinear, ScaledLinear
from ...validation import nearest
from ..config.arguments import Config, OptimizerArguments, RunArguments, mapping
from ..errors import BadInput

# Keys of a configuration that reach an optimizer where it has them: those of a subspace its ranked matrices alone.
SUBSPACE_KEYS = ("update_proj_gap", "scale", "proj_type", "subspace_method")
MASK_KEYS = ("sparsity", "update_every", "drop_fraction", "t_end")


def _adam_keys(run: RunArguments) -> dict[str, Any]:
    return {**_lion_keys(run), "eps": run.adam_epsilon}


def _lion_keys(run: RunArguments) -> dict[str, Any]:
    return {"lr": run.learning_rate, "betas": (run.adam_beta1, run.adam_beta2)}


def _adafactor_keys(run: RunArguments) -> dict[str, Any]:
    return {"lr": run.learning_rate, "relative_step": False, "scale_parameter": False}


def _torch_keys(run: RunArguments) -> dict[str, Any]:
    return {**_adam_keys(run), "fused": True}


def _heads(model: nn.Module) -> dict[str, Any]:
    """How many heads the attention matrices of a LLaMA have: GaLore+ shares a projector among them."""
    fields = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.dim() == 2 and p.requires_grad}
    return {"num_heads": {name: getattr(model.config, field) for name, field in fields.items() if name in trained}}


def _pattern(model: nn.Module) -> dict[str, Any]:
    """n and m, which the layers have."""
    layer = next(module for module in model.modules() if isinstance(module, (NMLinear, ScaledLinear)))
    return {"n": layer.n, "m": layer.m}


class Recipe(NamedTuple):
    """How a class is built from a configuration: the keys it takes from TrainingArguments, those that it takes from the
    model, and those that are by default a share of the run's steps."""

    optimizer: Callable[..., torch.optim.Optimizer]
    keys: Callable[[RunArguments], dict[str, Any]] = _adam_keys
    matrix_keys: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    clocks: Mapping[str, float] = {}

    def accepts(self) -> set[str]:
        return set(inspect.signature(self.optimizer).parameters) - {"params"}


MASK_CLOCK = {"t_end": 0.75}  # RigL's
ENVELOPE_CLOCK = {"ramp_steps": 0.5, "finish_at": 0.8}
OPTIMIZERS = {
    "adamw": Recipe(torch.optim.AdamW, _torch_keys),
    "lion": Recipe(optim.Lion, _lion_keys),
    "galore_adamw": Recipe(optim.GaLoreAdamW),
    "galore_adamw_8bit": Recipe(optim.GaLoreAdamW8bit),
    "galore_adafactor": Recipe(optim.GaLoreAdafactor, _adafactor_keys),
    "galore_lion": Recipe(optim.GaLoreLion, _lion_keys),
    "galore_plus_adamw": Recipe(optim.GaLorePlusAdamW, matrix_keys=_heads),
    "fira_adamw": Recipe(optim.FiraAdamW),
    "gradnormlorp_adamw": Recipe(optim.GradNormLoRPAdamW),
    "dct_adamw": Recipe(optim.DCTAdamW),
    "apollo_adamw": Recipe(optim.APOLLOAdamW),
    "ldadamw": Recipe(optim.LDAdamW),
    "sltrain_adamw": Recipe(optim.SLTrainAdamW),
    "sltrain_adamw_8bit": Recipe(optim.SLTrainAdamW8bit),
    "sst_adamw": Recipe(optim.SSTAdamW),
    "relora_adamw": Recipe(optim.ReLoRAAdamW),
    "sr_ste_adamw": Recipe(optim.SRSTEAdamW, matrix_keys=_pattern),
    "cast_adams": Recipe(optim.CastAdamS, matrix_keys=_pattern, clocks={"total_steps": 1.0}),
    "hyper_sparse_adamw": Recipe(optim.HyperSparseAdamW, clocks={"prune_at": 0.6}),
    "wgsef_adamw": Recipe(optim.WGSEFAdamW, clocks=ENVELOPE_CLOCK),
    "sparse_adamw": Recipe(optim.SparseAdamW, clocks=MASK_CLOCK),
    "set_adamw": Recipe(optim.SETAdamW, clocks=MASK_CLOCK),
    "rigl_adamw": Recipe(optim.RigLAdamW, clocks=MASK_CLOCK),
    "srigl_adamw": Recipe(optim.SRigLAdamW, clocks=MASK_CLOCK),
    "block_sparse_adamw": Recipe(optim.BlockSparseAdamW, clocks=MASK_CLOCK),
}


def build_optimizer(model: nn.Module, chosen: OptimizerArguments, run: RunArguments) -> torch.optim.Optimizer:
    """The optimizer of a run on ``model``'s trainable parameters.

    Raises:
        BadInput: for an unknown name, a key or value the optimizer refuses or a pattern that matches no layer.
    """
    recipe = _recipe(chosen)
    keywords = _keywords(chosen)
    known = recipe.accepts() - {"rank", "n", "m", "keep", *SUBSPACE_KEYS, *MASK_KEYS}
    for key in keywords:
        if key not in known:
            raise BadInput(f"optimizer_args: {chosen.optimizer} takes no {key!r} there; {nearest(key, known)}")
    if "state_dtype" in keywords:
        keywords["state_dtype"] = _dtype(keywords["state_dtype"])
    try:
        rank = chosen.rank if "rank" in recipe.accepts() else None
        matrix_keys = _mark(recipe, model, chosen) if rank is None else _matrix_keys(recipe, model, chosen, keywords)
        groups = optim.param_groups(model, rank, chosen.target_modules, weight_decay=run.weight_decay, **matrix_keys)
        keywords = {**_mask_keys(recipe, chosen, run), **keywords}
        return recipe.optimizer(groups, **{**recipe.keys(run), **_clocks(recipe, run, keywords), **keywords})
    except (ValueError, ImportError) as error:
        raise BadInput(str(error)) from None


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
    except ValueError as error:
        told = str(error).replace("restart_warmup_steps", "lr_restart_warmup")
        raise BadInput(told.replace("restart_every", "lr_restart_every").replace("lr_lr_", "lr_")) from None


def in_place_of(chosen: OptimizerArguments, optimizer: str) -> OptimizerArguments:
    """The same choice with another optimizer, and those of its further keywords that this one takes."""
    if optimizer == chosen.optimizer:
        return chosen
    other = replace(chosen, optimizer=optimizer)
    taken = {key: value for key, value in _keywords(chosen).items() if key in _recipe(other).accepts()}
    return replace(other, optimizer_args=json.dumps(taken))


def _keywords(chosen: OptimizerArguments) -> dict[str, Any]:
    return mapping("optimizer_args", chosen.optimizer_args, '{"error_feedback": "8bit"}')


def _dtype(name: Any) -> torch.dtype | None:
    if name is None:
        return None
    known = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    if name not in known:
        raise BadInput(f"optimizer_args: unknown state_dtype {name!r}; choose one of {', '.join(known)}")
    return known[name]


def _mark(recipe: Recipe, model: nn.Module, chosen: OptimizerArguments) -> dict[str, Any]:
    """What makes the target matrices of an optimizer without ranks special, if anything does."""
    if "n" in recipe.accepts():
        return recipe.matrix_keys(model)
    if not recipe.accepts() & {"sparsity", "keep"}:
        return {}
    if chosen.sparsity is None:
        raise BadInput(f"optimizer {chosen.optimizer} needs sparsity, the share of weights that are zero, such as 0.9")
    return {"keep": 1 - chosen.sparsity} if "keep" in recipe.accepts() else {"sparsity": chosen.sparsity}


def _mask_keys(recipe: Recipe, chosen: OptimizerArguments, run: RunArguments) -> dict[str, Any]:
    given = {key: getattr(chosen, key) for key in MASK_KEYS if key != "sparsity"} | {"seed": run.seed}
    known = recipe.accepts() if "sparsity" in recipe.accepts() else set()
    return {key: value for key, value in given.items() if value is not None and key in known}


def _clocks(recipe: Recipe, run: RunArguments, given: Mapping[str, Any]) -> dict[str, Any]:
    """Steps at which something ends, as shares of the run's, where they are not given."""
    missing = {key: share for key, share in recipe.clocks.items() if key not in given}
    if missing and run.max_steps <= 0:
        key, share = next(iter(missing.items()))
        raise BadInput(f"{key} is {share:g} of max_steps by default; give one of the two")
    return {key: max(1, round(share * run.max_steps)) for key, share in missing.items()}


def without_effect(config: Config) -> list[str]:
    """The subspace keys that were given and that the chosen optimizer does not have."""
    accepted = _recipe(config.optimizer).accepts()
    told = ("rank", *SUBSPACE_KEYS, *MASK_KEYS, "target_modules")
    layered = config.model.layer is not None
    present = accepted | ({"rank"} if layered else set())
    present |= {"target_modules"} if layered or accepted & {"rank", "sparsity", "keep"} else set()
    present |= {"sparsity"} if "keep" in accepted else set()
    return [key for key in told if key in config.given and key not in present]


def _recipe(chosen: OptimizerArguments) -> Recipe:
    if chosen.optimizer not in OPTIMIZERS:
        raise BadInput(f"unknown optimizer {chosen.optimizer!r}; {nearest(chosen.optimizer, OPTIMIZERS)}")
    return OPTIMIZERS[chosen.optimizer]


def _matrix_keys(
    recipe: Recipe, model: nn.Module, chosen: OptimizerArguments, keywords: dict[str, Any]
) -> dict[str, Any]:
    given = {key: getattr(chosen, key) for key in SUBSPACE_KEYS}
    keys = {key: value for key, value in given.items() if value is not None and key in recipe.accepts()}
    return keys | {key: value for key, value in recipe.matrix_keys(model).items() if key not in keywords}
