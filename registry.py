"""Every optimizer and layer of this package by the name that a configuration gives it, and the embedded recipes.

A new method is one entry here, beside its own file and its export. The command's help, the checks of a configuration,
the memory planner, the tables of the documentation and the tests' catalogue all read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import torch

from . import optim
from .models import layers
from .models.layer_schedules.gradient_annealing import GradientAnnealing
from .models.layer_schedules.mask_decay import MaskDecay
from .models.layer_schedules.ordered_dropout import OrderedDropout
from .optim.core.keywords import keyword_names
from .optim.core.optimizer import COMMON_KEYS, ShardedOptimizer

Family = Literal["plain", "low_rank", "sparse", "factored"]


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer.

    Attributes:
        family: ``plain`` trains every parameter alike; ``low_rank`` keeps its state in a subspace of each target
            matrix; ``sparse`` makes target matrices sparse; ``factored`` trains the factors of a layer.
        paper, arxiv: where it comes from.
        replaces: classes that it is a drop-in replacement for.
        layer: the layer that it needs, by its name below.
        trains_masks: whether it decides which weights of a matrix are zero, also for layers that leave that to it.
        run_keys: the keys that it takes from a run's arguments: ``adam``'s, ``lion``'s, ``adafactor``'s or ``torch``'s.
        model_keys: the keys that it takes from the model: ``heads`` (of the attention matrices), ``pattern`` (the n and
            m of its layer) or ``roles`` (what each matrix is for).
        clocks: keys that are steps, as shares of the run's steps where they are not given.
    """

    name: str
    cls: type[torch.optim.Optimizer]
    family: Family
    summary: str
    paper: str
    arxiv: str
    replaces: tuple[str, ...] = ("torch.optim.AdamW",)
    layer: str | None = None
    trains_masks: bool = False
    run_keys: Literal["adam", "lion", "adafactor", "torch"] = "adam"
    model_keys: Literal["heads", "pattern", "roles"] | None = None
    clocks: Mapping[str, float] = field(default_factory=dict)

    def accepts(self) -> set[str]:
        """The keywords of its constructor, and the keys that every class here has."""
        ours = COMMON_KEYS.keys() if issubclass(self.cls, ShardedOptimizer) else set()
        return keyword_names(self.cls) | ours


@dataclass(frozen=True)
class LayerEntry:
    """A layer that takes the place of the target linear layers.

    Attributes:
        trained_by: ``any`` optimizer, ``its own`` (those that need it), or those that train ``masks``.
        schedule: what changes it from step to step; takes further keywords of ``layer_args``.
        own_rank: whether ``rank`` in ``layer_args`` alone sets its rank, and not the configuration's.
        whole_factors: whether training needs them on each process.
        float32_unless: the key without which its weights must be float32.
    """

    name: str
    cls: type[layers.FactoredLinear]
    summary: str
    paper: str
    arxiv: str
    trained_by: Literal["any", "its own", "masks"] = "any"
    schedule: type[Any] | None = None
    own_rank: bool = False
    whole_factors: bool = False
    float32_unless: str | None = None

    @property
    def takes_masks(self) -> bool:
        return self.trained_by == "masks"

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Names of the optimizers that it must be trained with; none where any will do."""
        if self.trained_by == "any":
            return ()
        chosen = OPTIMIZERS.values()
        return tuple(e.name for e in chosen if (e.trains_masks if self.takes_masks else e.layer == self.name))


@dataclass(frozen=True)
class RecipeEntry:
    """An embedded configuration."""

    name: str
    summary: str

    @property
    def command(self) -> str:
        """The word behind ``gracile`` that runs it."""
        return "finetune" if self.name.startswith("finetune_") else "pretrain"


def _by_name(*entries: Any) -> Any:
    return {entry.name: entry for entry in entries}


GALORE = ("Zhao et al. 2024", "2403.03507")
SLTRAIN = ("Han et al. 2024", "2406.02214")
SPARSE_IFT = ("Thangarasa et al. 2023", "2303.11525")
SET = ("Mocanu et al. 2018", "1707.04780")
ADAM_8BIT = "bitsandbytes.optim.AdamW8bit"
MASK_CLOCK = {"t_end": 0.75}  # RigL's
ENVELOPE_CLOCK = {"ramp_steps": 0.5, "finish_at": 0.8}

OPTIMIZERS: dict[str, OptimizerEntry] = _by_name(
    OptimizerEntry(
        "adamw", torch.optim.AdamW, "plain", "PyTorch's own AdamW, the baseline.",
        "Loshchilov & Hutter 2017", "1711.05101", replaces=(), run_keys="torch",
    ),
    OptimizerEntry(
        "lion", optim.Lion, "plain", "The sign of an interpolated momentum: one moment instead of two.",
        "Chen et al. 2023", "2302.06675", replaces=("lion_pytorch.Lion", "torch.optim.AdamW"), run_keys="lion",
    ),
    OptimizerEntry(
        "scale", optim.SCALE, "plain", "Gradients divided by their size at each output; only the head has a moment.",
        "Glentis et al. 2025", "2506.16659", model_keys="roles",
    ),
    OptimizerEntry(
        "galore_adamw", optim.GaLoreAdamW, "low_rank", "AdamW in the leading singular subspace of each gradient.",
        *GALORE, replaces=("galore_torch.GaLoreAdamW", "torch.optim.AdamW"),
    ),
    OptimizerEntry(
        "galore_adamw_8bit", optim.GaLoreAdamW8bit, "low_rank",
        "GaLore with 8-bit moments; as options, Q-GaLore's packed projector and lazy refreshes.",
        "Zhao et al. 2024; Zhang et al. 2024", "2407.08296", replaces=("galore_torch.GaLoreAdamW8bit", ADAM_8BIT),
    ),
    OptimizerEntry(
        "galore_adafactor", optim.GaLoreAdafactor, "low_rank", "Adafactor in GaLore's subspace.",
        *GALORE, replaces=("galore_torch.GaLoreAdafactor", "transformers.Adafactor"), run_keys="adafactor",
    ),
    OptimizerEntry(
        "galore_lion", optim.GaLoreLion, "low_rank", "Lion in GaLore's subspace.",
        *GALORE, replaces=("lion_pytorch.Lion",), run_keys="lion",
    ),
    OptimizerEntry(
        "galore_plus_adamw", optim.GaLorePlusAdamW, "low_rank",
        "GaLore with a projector shared by a layer's heads, found fast, and a sparse residual.",
        "Liao et al. 2024", "2412.19820", model_keys="heads",
    ),
    OptimizerEntry(
        "fira_adamw", optim.FiraAdamW, "low_rank", "GaLore plus the rest of the gradient, scaled by norms.",
        "Chen et al. 2024", "2410.01623", replaces=("fira.FiraAdamW", "torch.optim.AdamW"),
    ),
    OptimizerEntry(
        "gradnormlorp_adamw", optim.GradNormLoRPAdamW, "low_rank",
        "AdamW on weight-normalised rows: lengths in full, directions in a subspace.",
        "Huang et al. 2024", "2412.19616",
    ),
    OptimizerEntry(
        "dct_adamw", optim.DCTAdamW, "low_rank", "AdamW in the best columns of a fixed cosine basis: no SVD.",
        "Modoranu et al. 2025", "2505.17967",
    ),
    OptimizerEntry(
        "apollo_adamw", optim.APOLLOAdamW, "low_rank",
        "The raw gradient, scaled by what Adam would do in a small random subspace.",
        "Zhu et al. 2024", "2412.05270", replaces=("apollo_torch.APOLLOAdamW", "torch.optim.AdamW"),
    ),
    OptimizerEntry(
        "ldadamw", optim.LDAdamW, "low_rank", "AdamW whose subspace follows the gradient at every step.",
        "Robert et al. 2024", "2410.16103",
    ),
    OptimizerEntry(
        "sltrain_adamw", optim.SLTrainAdamW, "factored", "AdamW on the factors and sparse values of SLTrain's layers.",
        *SLTRAIN, layer="sltrain",
    ),
    OptimizerEntry(
        "sltrain_adamw_8bit", optim.SLTrainAdamW8bit, "factored", "The same with 8-bit moments.",
        *SLTRAIN, replaces=(ADAM_8BIT,), layer="sltrain",
    ),
    OptimizerEntry(
        "sst_adamw", optim.SSTAdamW, "factored", "AdamW on singular values and on sampled singular vectors.",
        "Zhao et al. 2024", "2405.15481", layer="sst",
    ),
    OptimizerEntry(
        "relora_adamw", optim.ReLoRAAdamW, "factored", "AdamW on low-rank factors that are merged again and again.",
        "Lialin et al. 2023", "2307.05695", layer="relora",
    ),
    OptimizerEntry(
        "sr_ste_adamw", optim.SRSTEAdamW, "sparse",
        "AdamW with SR-STE's pull of pruned weights to zero, for n:m layers.",
        "Zhou et al. 2021", "2102.04010", layer="nm", model_keys="pattern",
    ),
    OptimizerEntry(
        "cast_adams", optim.CastAdamS, "sparse", "AdamS: a dense model's matrices become n:m while they train.",
        "Huang et al. 2025", "2509.25996", layer="cast", model_keys="pattern", clocks={"total_steps": 1.0},
    ),
    OptimizerEntry(
        "hyper_sparse_adamw", optim.HyperSparseAdamW, "sparse",
        "AdamW with a growing pull on small weights, which are then pruned once.",
        "Glandorf et al. 2023", "2308.07163", clocks={"prune_at": 0.6},
    ),
    OptimizerEntry(
        "wgsef_adamw", optim.WGSEFAdamW, "sparse", "AdamW that drives whole rows, columns or blocks to zero.",
        "Refael et al. 2022", "2212.12921", clocks=ENVELOPE_CLOCK,
    ),
    OptimizerEntry(
        "sparse_adamw", optim.SparseAdamW, "sparse", "Dynamic sparse training by any combination of published choices.",
        *SET, trains_masks=True, clocks=MASK_CLOCK,
    ),
    OptimizerEntry(
        "set_adamw", optim.SETAdamW, "sparse", "SET: the smallest weights go, random others come.",
        *SET, trains_masks=True, clocks=MASK_CLOCK,
    ),
    OptimizerEntry(
        "rigl_adamw", optim.RigLAdamW, "sparse",
        "RigL: the smallest weights go, those with the largest gradients come.",
        "Evci et al. 2020", "1911.11134", trains_masks=True, clocks=MASK_CLOCK,
    ),
    OptimizerEntry(
        "srigl_adamw", optim.SRigLAdamW, "sparse",
        "RigL with as many weights in each row, and neurons that are ablated.",
        "Lasby et al. 2024", "2305.02299", trains_masks=True, clocks=MASK_CLOCK,
    ),
    OptimizerEntry(
        "block_sparse_adamw", optim.BlockSparseAdamW, "sparse", "BLaST: AdamW that ends with blocks of weights.",
        "Okanovic et al. 2025", "2507.03117", trains_masks=True, clocks=MASK_CLOCK,
    ),
)  # fmt: skip

LAYERS: dict[str, LayerEntry] = _by_name(
    LayerEntry(
        "low_rank", layers.LowRankLinear, "W = B A, the low-rank baseline.", "Kamalakara et al. 2022", "2209.13569"
    ),
    LayerEntry("sltrain", layers.SparseLowRankLinear, "Low-rank factors plus values at fixed random places.", *SLTRAIN),
    LayerEntry(
        "sst", layers.SpectralLinear, "W by its singular values and vectors, of which some train at a time.",
        "Zhao et al. 2024", "2405.15481", trained_by="its own",
    ),
    LayerEntry(
        "relora", layers.ReLoRALinear, "A frozen W, and low-rank factors that are merged into it.",
        "Lialin et al. 2023", "2307.05695", trained_by="its own",
    ),
    LayerEntry(
        "maestro", layers.OrderedLowRankLinear, "Factors ordered by importance, which lose components as they train.",
        "Horvath et al. 2023", "2308.14929", schedule=OrderedDropout, own_rank=True, whole_factors=True,
    ),
    LayerEntry(
        "autosparse", layers.ThresholdLinear, "A threshold that each layer learns, below which weights are zero.",
        "Kundu et al. 2023", "2304.06941", schedule=GradientAnnealing, float32_unless="sparsity",
    ),
    LayerEntry(
        "nm", layers.NMLinear, "Of every m consecutive weights of a row, n count; masks may come gradually.",
        "Zhou et al. 2021; Bambhaniya et al. 2024", "2402.04744", schedule=MaskDecay,
    ),
    LayerEntry(
        "cast", layers.ScaledLinear, "A weight whose rows are scaled in pieces, on its way to n:m.",
        "Huang et al. 2025", "2509.25996", trained_by="its own",
    ),
    LayerEntry(
        "parallel", layers.ParallelLinear, "Several sparse branches with an activation each; as many weights as dense.",
        *SPARSE_IFT, trained_by="masks",
    ),
    LayerEntry(
        "factorised", layers.FactorisedLinear, "A product of two sparse matrices; as many weights as dense.",
        *SPARSE_IFT, trained_by="masks",
    ),
    LayerEntry(
        "doped", layers.DopedLinear, "A sparse matrix plus a dense low-rank one; as many weights as dense.",
        *SPARSE_IFT, trained_by="masks",
    ),
)  # fmt: skip


def recipes() -> dict[str, RecipeEntry]:
    """The embedded configurations, each with the first sentence of its file's comment."""
    folder = resources.files(f"{__package__}.configs")
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    names = {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in files}
    return {name: RecipeEntry(name, _first_sentence(text)) for name, text in names.items()}


def _first_sentence(text: str) -> str:
    lines = text.splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:count])
    return re.split(r"(?<=\.)\s+(?=[A-Z0-9`])(?<!al\. )", comment)[0]


# ---- tables for the documentation, in Markdown ----------------------------------------------------------------------


def optimizer_table() -> str:
    """Every optimizer: its name in a configuration, its class, what it does, its paper and what it replaces."""
    rows = ((f"`{e.name}`", _class_of(e.cls), e.summary, _paper(e), _names(e.replaces)) for e in OPTIMIZERS.values())
    return _table(("optimizer", "class", "what it does", "paper", "drop-in for"), rows)


def layer_table() -> str:
    """Every layer: its name in a configuration, its class, what it is, its paper and its optimizers."""
    rows = (
        (
            f"`{e.name}`",
            _class_of(e.cls),
            e.summary,
            _paper(e),
            _names(e.optimizers) or "any",
        )
        for e in LAYERS.values()
    )
    return _table(("layer", "class", "what it is", "paper", "optimizers"), rows)


def recipe_table() -> str:
    """Every embedded configuration and what it trains."""
    return _table(("recipe", "what it trains"), ((f"`{e.name}`", e.summary) for e in recipes().values()))


def _class_of(cls: type) -> str:
    return f"`{'torch.optim.' if cls.__module__.startswith('torch.') else ''}{cls.__name__}`"


def _paper(entry: OptimizerEntry | LayerEntry) -> str:
    return f"{entry.paper}, [{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
