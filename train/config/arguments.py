"""The configuration of a run, as dataclasses: the model, the data, the optimizer, and everything of
``transformers.TrainingArguments`` under its own names."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ...registry import LAYERS, OPTIMIZERS
from ...target_modules import DEFAULT_TARGETS
from ..engines.deepspeed_ops import skip_inference_reduce

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Keywords(dict[str, Any]):
    """Keyword arguments of something that is built: a mapping, or the JSON text of one as a command line has it.

    Raises:
        ValueError: for text that is no mapping in JSON.
    """

    def __init__(self, given: str | Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        if isinstance(given, str):
            given = json.loads(given)
            if not isinstance(given, dict):
                raise ValueError("JSON, but no mapping")
        super().__init__(given)

    def __str__(self) -> str:
        return json.dumps(self)


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


@dataclass
class ModelArguments:
    """What is trained."""

    model: str = field(
        default="2m", metadata={"help": "A size (2m, 9m, ... 7b), the path of a saved model, or hub:org/name."}
    )
    model_overrides: Keywords | None = field(
        default=None, metadata={"help": 'Fields of a size changed, as a mapping: {"num_hidden_layers": 2}.'}
    )
    layer: str | None = field(
        default=None,
        metadata={
            "help": f"Layers in place of the target linear layers: {_listed(LAYERS)}; rank, sparsity and "
            "target_modules are theirs."
        },
    )
    layer_args: Keywords | None = field(
        default=None, metadata={"help": 'Further keywords of the layers, as a mapping: {"density": 0.03}.'}
    )
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights: float32 or bfloat16."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that a saved model, tokenizer or data set brings along."}
    )


@dataclass
class DataArguments:
    """What it reads."""

    dataset: str = field(
        default="stdlib",
        metadata={
            "help": "stdlib (the source text of this Python's standard library), a txt / jsonl / parquet file, "
            "folder or glob, or a hub name such as allenai/c4 (streamed)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set: en for c4."})
    text_column: str = field(default="text", metadata={"help": "Column of jsonl, parquet and hub data."})
    streaming: bool = field(
        default=False, metadata={"help": "Read local files as a stream instead of packing them first."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Path or hub:org/name; by default the saved model's, else a BPE trained on the data and cached."
        },
    )
    block_size: int = field(default=256, metadata={"help": "Tokens per training example."})
    validation_blocks: int = field(
        default=200, metadata={"help": "Examples held out for validation, at most a tenth of a corpus."}
    )


@dataclass
class OptimizerArguments:
    """How it is optimized."""

    optimizer: str = field(default="galore_adamw", metadata={"help": f"{_listed(OPTIMIZERS)}."})
    rank: int = field(default=128, metadata={"help": "Rank of the subspace, or of the layer, of each target matrix."})
    update_proj_gap: int | None = field(
        default=None, metadata={"help": "Steps between refreshes of the subspace; by default the optimizer's own."}
    )
    scale: float | None = field(
        default=None, metadata={"help": "Factor on the update of the target matrices; by default the optimizer's own."}
    )
    subspace_method: str | None = field(
        default=None,
        metadata={"help": "How the subspace is found: iterate, one cheap warm iteration, or svd, exact."},
    )
    proj_type: str = field(default="std", metadata={"help": "Side projected: std, reverse_std, left or right."})
    sparsity: float | None = field(
        default=None, metadata={"help": "Share of the target matrices' weights that is zero, of an optimizer of masks."}
    )
    update_every: int | None = field(
        default=None, metadata={"help": "Steps between changes of the masks; by default the optimizer's own."}
    )
    drop_fraction: float | None = field(
        default=None, metadata={"help": "Share of a mask that changes, at first; 0 keeps the first masks."}
    )
    t_end: int | None = field(
        default=None, metadata={"help": "Last step of the masks' changes; by default three quarters of max_steps."}
    )
    art_every: int | None = field(
        default=None,
        metadata={
            "help": "Steps between looks at the model without its smallest weights, of hyper_sparse_adamw: they go "
            "when it is as good without them, or at prune_at."
        },
    )
    target_modules: list[str] = field(
        default_factory=lambda: list(DEFAULT_TARGETS),
        metadata={
            "help": "Parts of, or regular expressions for, the names of the layers that get a rank or a mask; or "
            "all-linear."
        },
    )
    lr_restart_every: int | None = field(
        default=None,
        metadata={
            "help": "Steps between restarts of a cosine, as ReLoRA merges; in place of lr_scheduler_type, of whose "
            "lr_scheduler_kwargs min_lr_rate counts."
        },
    )
    lr_restart_warmup: int = field(default=100, metadata={"help": "Steps of the rise after each restart."})
    teacher: str | None = field(
        default=None,
        metadata={"help": "A saved model whose predictions are imitated: for cast, the dense one that it begins with."},
    )
    distill: float = field(default=1 / 3, metadata={"help": "The teacher's share of the loss; the rest is the data's."})
    optimizer_args: Keywords | None = field(
        default=None,
        metadata={"help": 'Further keywords of the optimizer, as a mapping: {"error_feedback": "8bit"}.'},
    )


@dataclass
class RunArguments(TrainingArguments):
    """``TrainingArguments`` with other defaults: TensorBoard on, non-finite losses never hidden."""

    # HfArgumentParser reads unions by position: None must come first here.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="tensorboard", metadata={"help": "Where metrics are logged."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between logged losses."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Kept off: a non-finite loss stops the run instead of being averaged away."}
    )
    evaluate_at: list[int] = field(
        default_factory=list, metadata={"help": "Single steps to evaluate at, besides eval_strategy."}
    )

    @property
    def folder(self) -> Path:
        """``output_dir``, which TrainingArguments always sets, as a path."""
        assert self.output_dir is not None
        return Path(self.output_dir)

    def __post_init__(self) -> None:
        # Without this, processes that were launched together on CPUs would each train alone, into one folder.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints that it guesses
        if self.deepspeed is not None and self.use_cpu:
            skip_inference_reduce()
        super().__post_init__()
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world_size:
            raise ValueError(f"WORLD_SIZE is {launched} but only {self.world_size} process(es) found each other")


GROUPS: Any = (ModelArguments, DataArguments, OptimizerArguments, RunArguments)


@dataclass(frozen=True)
class Config:
    """A resolved configuration.

    Attributes:
        given: keys that the file or the command line has.
        left_out: keys of a recipe for another optimizer than the command line names.
    """

    name: str
    model: ModelArguments
    data: DataArguments
    optimizer: OptimizerArguments
    run: RunArguments
    given: dict[str, Any]
    left_out: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """The keys that make two runs the same run: what cannot change between a run and its resumption."""
        parts = (self.model, self.data, self.optimizer)
        return _plain({k: v for part in parts for k, v in dataclasses.asdict(part).items()})

    def resolved(self) -> dict[str, Any]:
        """Flat keys that reproduce the run, in a form that YAML can hold."""
        return {**_plain(self.given), **self.identity()}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in a form that YAML can hold; mappings as JSON text."""
    plain = (int, float, bool, list, type(None))
    return {key: value if isinstance(value, plain) else str(value) for key, value in values.items()}
