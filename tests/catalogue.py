"""Every optimizer of the package as the tests make it: one row a variant, with its keys for each kind of test.

``cells``: a small net over processes, 12 steps (tests/distributed). ``quadratic``: matrices by themselves, with
refreshes on steps 0, 4, 8, ... (tests/optim/test_every_class.py). ``script``: the Trainer's scripts, some ten steps
(tests/train/test_trainer_scripts.py). A variant without keys for a kind of test is not in it; test_catalogue.py sees
that every class is in all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gracile import optim
from gracile.models import layers

Keys = dict[str, Any]
CELL_STEPS = 12


class Use(NamedTuple):
    """Keys of the constructor, and of the groups of matrices; None where there is but one kind of group."""

    keys: Keys
    matrices: Keys | None = None


class Layer(NamedTuple):
    cls: type[layers.FactoredLinear]
    keys: Keys
    script_keys: Keys | None = None


class Variant(NamedTuple):
    """``state`` says what its state is made of: of the variants with the same, one is enough where only that matters.
    ``jumps``: its run changes by more than rounding where a gradient changes in its last bit."""

    cls: type[torch.optim.Optimizer]
    state: str
    cells: Use | None = None
    quadratic: Use | None = None
    script: Use | None = None
    layer: Layer | None = None
    jumps: bool = False


# ---- shared keys ----------------------------------------------------------------------------------------------------

EPS = {"eps": 1e-6}  # an eps far below the gradients would show their rounding, not the layout's
IN_RUN = {**EPS, "lr": 3e-3}
# of cells
ADAFACTOR = {"relative_step": False, "scale_parameter": True, "beta1": 0.9, "lr": 0.1}
MASKED = {**EPS, "update_every": 4, "t_end": 14}
AGED = {"grown_step": "own", "grown_warmup": 3}
SQUEEZED = {**EPS, "hs_lambda": 3e-3, "interval": 3, "warmup_steps": 2, "quantile_every": 4, "prune_at": 10}
ENVELOPED = {**EPS, "wgsef_lambda": 0.05, "ramp_steps": 5, "finish_at": 10, "block_size": 4}
PATTERN = {"n": 1, "m": 3}
GAP = 5  # of refreshes
# of quadratics
RANKED = {"rank": 4, "update_proj_gap": 4}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
LAZY = {"quant": True, "cos_threshold": 0.4, "queue_size": 1}
PLUS = {"residual_warmup": 3, "residual_fraction": 0.1}
FIXED_LR = {"lr": 0.05, "relative_step": False, "scale_parameter": False}
RELATIVE_LR = {"lr": 0.15, "relative_step": False, "beta1": 0.9}  # in units of the weights' size: a tensor
MASK = {"lr": 0.05, "update_every": 4, "drop_fraction": 0.2, "t_end": 30}
HALF = {"sparsity": 0.4, "distribution": "uniform"}
CAST = {"lr": 0.01, "n": None, "total_steps": 400, "lam": 1e-4}
# of scripts
LOW_RANK = {"rank": 4, "update_proj_gap": 3}
MASK_IN_SCRIPT = {"lr": 0.01, "update_every": 3, "t_end": 7}
LR = {"lr": 0.01}

SPARSE_LOW_RANK = Layer(layers.SparseLowRankLinear, {"density": 0.1}, {"rank": 8, "density": 0.1})

# ---- the rows -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "AdamW": Variant(torch.optim.AdamW, "torch's", Use(EPS)),
    "Lion": Variant(optim.Lion, "moments", Use({"lr": 1e-3}), Use({"lr": 0.02}, {}), Use({"lr": 0.005}, {})),
    "GaLoreAdamW": Variant(optim.GaLoreAdamW, "basis", Use({}, {}), Use({"lr": 0.2}, RANKED), Use(LR, LOW_RANK)),
    "GaLoreAdamW svd": Variant(optim.GaLoreAdamW, "basis", Use({}, {"subspace_method": "svd"}), jumps=True),
    "GaLoreAdamW iterate": Variant(
        optim.GaLoreAdamW, "basis", quadratic=Use({"lr": 0.2}, RANKED | {"subspace_method": "iterate"})
    ),
    "GaLoreAdamW8bit": Variant(optim.GaLoreAdamW8bit, "moments in 8 bits", Use(EPS, {}), Use({"lr": 0.2}, RANKED)),
    "GaLoreAdamW8bit Q-GaLore": Variant(
        optim.GaLoreAdamW8bit,
        "basis in 4 bits",
        Use(EPS, {"quant": True, "cos_threshold": 0.4}),
        Use({"lr": 0.2}, RANKED | LAZY),
        Use(LR, LOW_RANK | LAZY),
    ),
    "GaLoreAdafactor": Variant(
        optim.GaLoreAdafactor,
        "factored moments",
        Use(ADAFACTOR, {}),
        Use(FIXED_LR, RANKED | {"scale": 1.0}),
        Use({**FIXED_LR, **LR}, LOW_RANK),
    ),
    "GaLoreAdafactor relative": Variant(
        optim.GaLoreAdafactor, "factored moments", quadratic=Use(RELATIVE_LR, RANKED | {"scale": 1.0})
    ),
    "GaLoreLion": Variant(
        optim.GaLoreLion,
        "basis",
        Use({"lr": 3e-3, "maximize": True}, {}),
        Use({"lr": 0.1}, RANKED),
        Use({"lr": 0.005}, LOW_RANK),
    ),
    "GaLorePlusAdamW": Variant(
        optim.GaLorePlusAdamW,
        "basis",
        Use({}, {"residual_warmup": 5, "residual_fraction": 0.1}),
        Use({"lr": 0.2}, RANKED | PLUS),
        Use(LR, LOW_RANK | {"num_heads": 2, "residual_warmup": 2}),
    ),
    "GaLorePlusAdamW heads": Variant(
        optim.GaLorePlusAdamW, "basis", quadratic=Use({"lr": 0.2}, RANKED | PLUS | {"num_heads": 2})
    ),
    "FiraAdamW": Variant(optim.FiraAdamW, "basis", Use({}, {}), Use({"lr": 0.1}, RANKED), Use(LR, LOW_RANK)),
    "GradNormLoRPAdamW": Variant(
        optim.GradNormLoRPAdamW, "basis", Use({"lr": 3e-3}, {}), Use({"lr": 0.1}, RANKED), Use(LR, LOW_RANK)
    ),
    "DCTAdamW": Variant(
        optim.DCTAdamW, "columns", Use(EPS, {"update_proj_gap": 1}), Use({"lr": 0.05}, RANKED), Use(LR, LOW_RANK)
    ),
    "DCTAdamW fed back": Variant(
        optim.DCTAdamW,
        "errors",
        Use(EPS, {"update_proj_gap": 5, "error_feedback": "fp32", "rotate_subspace": True}),
        Use({"lr": 0.05}, RANKED | {"error_feedback": "fp32", "rotate_subspace": True}),
    ),
    "DCTAdamW fed back in 8 bits": Variant(
        optim.DCTAdamW,
        "errors in 8 bits",
        Use(EPS, {"update_proj_gap": 1, "error_feedback": "8bit"}),
        Use({"lr": 0.05}, RANKED | {"error_feedback": "8bit"}),
    ),
    "DCTAdamW fed back in 4 bits": Variant(
        optim.DCTAdamW, "errors in 8 bits", quadratic=Use({"lr": 0.05}, RANKED | {"error_feedback": "4bit"})
    ),
    "APOLLOAdamW": Variant(optim.APOLLOAdamW, "a seed", Use({}, {}), Use({"lr": 0.05}, RANKED), Use(LR, LOW_RANK)),
    "APOLLOAdamW Mini": Variant(
        optim.APOLLOAdamW,
        "a seed",
        Use({}, {"rank": 1, "scale_type": "tensor", "scale": 8.0}),
        Use({"lr": 0.02}, RANKED | MINI),
    ),
    "APOLLOAdamW svd": Variant(
        optim.APOLLOAdamW, "basis", Use({}, {"proj": "svd"}), Use({"lr": 0.05}, RANKED | {"proj": "svd"}), jumps=True
    ),
    "LDAdamW": Variant(optim.LDAdamW, "errors", Use(IN_RUN, {}), Use({"lr": 0.05}, {"rank": 4}), Use(LR, {"rank": 4})),
    "SCALE": Variant(
        optim.SCALE,
        "a moment of the head",
        Use(IN_RUN, {"role": {"head": "head", "small": "transposed"}}),
        Use({"lr": 0.02}, {"role": "linear"}),
        Use(LR, {"role": "linear"}),
    ),
    "SCALE l2": Variant(
        optim.SCALE,
        "a moment of the head",
        Use({**EPS, "norm": "l2", "lr": 1e-2}, {"role": {"head": "head"}}),
        Use({"lr": 0.2, "adam_scale": 0.1}, {"role": "embedding", "norm": "l2"}),
    ),
    "SCALE head": Variant(optim.SCALE, "a moment of the head", quadratic=Use({"lr": 0.02}, {"role": "head"})),
    "LDAdamW alone": Variant(optim.LDAdamW, "basis", quadratic=Use({"lr": 0.05}, {"rank": 4, "error_feedback": False})),
    # ---- of layers --------------------------------------------------------------------------------------------------
    "SLTrainAdamW": Variant(optim.SLTrainAdamW, "parts", Use(IN_RUN), script=Use(LR), layer=SPARSE_LOW_RANK),
    "SLTrainAdamW8bit": Variant(
        optim.SLTrainAdamW8bit, "moments in 8 bits", Use(IN_RUN), script=Use(LR), layer=SPARSE_LOW_RANK
    ),
    "SSTAdamW": Variant(
        optim.SSTAdamW,
        "parts",
        Use({**IN_RUN, "swap_every": GAP, "iterations": 2, "warmup_steps": 3}),
        script=Use({"lr": 0.01, "swap_every": 3, "iterations": 2}),
        layer=Layer(layers.SpectralLinear, {}, {"rank": 8}),
    ),
    "ReLoRAAdamW": Variant(
        optim.ReLoRAAdamW,
        "parts",
        Use({**IN_RUN, "merge_every": GAP, "eps": 1e-4}),  # right after a merge the gradients of B are small
        script=Use({"lr": 0.02, "merge_every": 3}),
        layer=Layer(layers.ReLoRALinear, {"alpha": 6.0}, {"rank": 8}),
    ),
    "AdamW on thresholds": Variant(
        torch.optim.AdamW, "torch's", Use(IN_RUN), layer=Layer(layers.ThresholdLinear, {"s_init": -2.5})
    ),
    "AdamW at a budget": Variant(
        torch.optim.AdamW, "torch's", Use(IN_RUN), layer=Layer(layers.ThresholdLinear, {"sparsity": 0.5})
    ),
    "SRSTEAdamW": Variant(
        optim.SRSTEAdamW,
        "pattern",
        Use({**IN_RUN, "n": None}, PATTERN | {"sr_lambda": 0.1}),
        Use({"lr": 0.05, "n": None}, {"n": 2, "m": 4, "sr_lambda": 0.1}),
        Use({"lr": 0.01, "n": None}),
        Layer(layers.NMLinear, PATTERN, {"n": 2, "m": 4}),
    ),
    "SRSTEAdamW decoupled": Variant(
        optim.SRSTEAdamW, "pattern", quadratic=Use({"lr": 0.05, "n": None, "decoupled": True}, {"n": 2, "m": 4})
    ),
    "CastAdamS": Variant(
        optim.CastAdamS,
        "pattern",
        Use({**EPS, "lr": 1e-3, "n": None, "total_steps": CELL_STEPS}, PATTERN | {"mask_every": GAP}),
        Use(CAST, {"n": 2, "m": 4, "mask_every": 4}),
        Use({"lr": 0.01, "n": None, "total_steps": 8}, {"n": 2, "m": 4}),
        Layer(layers.ScaledLinear, {**PATTERN, "pieces": 3}, {"n": 2, "m": 4}),
    ),
    # ---- with masks -------------------------------------------------------------------------------------------------
    "SETAdamW": Variant(
        optim.SETAdamW, "masks", Use(MASKED, {"sparsity": 0.8}), Use(MASK, HALF), Use(MASK_IN_SCRIPT, {"sparsity": 0.5})
    ),
    "RigLAdamW": Variant(
        optim.RigLAdamW,
        "masks",
        Use(MASKED, {"sparsity": 0.8}),
        Use(MASK, HALF),
        Use(MASK_IN_SCRIPT, {"sparsity": 0.5}),
    ),
    "SRigLAdamW": Variant(
        optim.SRigLAdamW,
        "masks of equal rows",
        Use({**MASKED, "gamma_sal": 0.9}, {"sparsity": 0.8}),
        Use(MASK, HALF | {"gamma_sal": 0.6}),
        Use(MASK_IN_SCRIPT, {"sparsity": 0.5}),
    ),
    "BlockSparseAdamW": Variant(
        optim.BlockSparseAdamW,
        "masks of blocks",
        Use({**MASKED, "drop_fraction": 0.2}, {"sparsity": 0.8, "block_size": 1}),
        Use(MASK | {"t_end": 9}, HALF | {"block_size": 1}),
        Use(MASK_IN_SCRIPT, {"sparsity": 0.5, "block_size": 1}),
    ),
    "SparseAdamW": Variant(
        optim.SparseAdamW,
        "masks",
        Use(
            {**MASKED, **AGED, "drop": "gradient_magnitude", "drop_lambda": 1.0, "grow": "momentum"},
            {"sparsity": 0.8, "distribution": "erk", "initial_sparsity": 0.5},
        ),
        Use(MASK, HALF | {"grow": "momentum", "initial_sparsity": 0.35}),
        Use(MASK_IN_SCRIPT, {"density": 0.5, "grow": "momentum"}),
    ),
    "SparseAdamW frozen": Variant(
        optim.SparseAdamW,
        "masks",
        Use({**MASKED, "outside": "frozen", "decay_to": "start"}, {"sparsity": 0.8, "init": "smallest"}),
        Use(MASK | {"outside": "frozen"}, HALF | {"init": "smallest"}),
    ),
    "HyperSparseAdamW": Variant(
        optim.HyperSparseAdamW,
        "masks at the end",
        Use(SQUEEZED, {"sparsity": 0.7}),
        Use({"lr": 0.05, "quantile_every": 4}, {"sparsity": 0.2}),
        Use({"lr": 0.01, "prune_at": 6}, {"sparsity": 0.5}),
    ),
    "HyperSparseAdamW pruned": Variant(
        optim.HyperSparseAdamW, "masks at the end", quadratic=Use({"lr": 0.05, "prune_at": 5}, {"sparsity": 0.2})
    ),
    "WGSEFAdamW": Variant(
        optim.WGSEFAdamW,
        "masks of groups",
        Use({**ENVELOPED, "groups": "rows"}, {"keep": 0.6}),
        Use({"lr": 0.05, "ramp_steps": 4}, {"keep": 0.9, "groups": "columns"}),
        Use({"lr": 0.01, "finish_at": 6}, {"keep": 0.5}),
    ),
    "WGSEFAdamW columns": Variant(
        optim.WGSEFAdamW, "masks of groups", Use({**ENVELOPED, "groups": "columns"}, {"keep": 0.6})
    ),
    "WGSEFAdamW blocks": Variant(
        optim.WGSEFAdamW, "masks of groups", Use({**ENVELOPED, "groups": "blocks"}, {"keep": 0.6})
    ),
    "WGSEFAdamW pruned": Variant(
        optim.WGSEFAdamW,
        "masks of groups",
        quadratic=Use({"lr": 0.05, "ramp_steps": 4, "finish_at": 5}, {"keep": 0.9}),
    ),
}

# ---- views ----------------------------------------------------------------------------------------------------------

# What runs over processes: where a test takes all of them it takes these, in this order.
OVER_PROCESSES = [name for name, variant in VARIANTS.items() if variant.cells and variant.cls is not torch.optim.AdamW]


def public_optimizers() -> set[type[torch.optim.Optimizer]]:
    found = {getattr(optim, name) for name in optim.__all__}
    return {cls for cls in found if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)}


def classes_of(names: list[str]) -> set[type[torch.optim.Optimizer]]:
    return {VARIANTS[name].cls for name in names}


def one_of_each_state(names: list[str]) -> list[str]:
    """The first variant of each kind of state."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(VARIANTS[name].state, name)
    return list(first.values())


def is_in_8_bits(name: str) -> bool:
    """Whether moments or errors are rounded to codes."""
    return VARIANTS[name].state in ("moments in 8 bits", "basis in 4 bits", "errors in 8 bits")
