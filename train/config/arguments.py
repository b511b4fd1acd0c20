"""The configuration of a run, as dataclasses: the model, the data, the optimizer, and everything of
``transformers.TrainingArguments`` under its own names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from transformers import TrainingArguments

from ...models.llama import SIZES
from ...registry import LAYERS, OPTIMIZERS
from ...target_modules import DEFAULT_TARGETS
from ..engines.deepspeed_ops import skip_inference_reduce

# Keys that may name a file or a folder.
PATH_KEYS = (
    "dataset", "validation_dataset", "forgetting_dataset", "tokenizer", "chat_template", "model", "adapter_from",
    "teacher", "deepspeed",
)  # fmt: skip
# Keys that run.yaml leaves out: how this start began, a secret, and what the Trainer would choose its optimizer by.
NOT_KEPT = {"resume_from_checkpoint", "hub_token", "local_rank", "optim", "optim_args", "optim_target_modules"}
NAMED = (*SIZES, "stdlib", "stdlib-docstrings")  # what those keys hold that is no path, whatever lies there
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
    weight_bits: int | None = field(
        default=None,
        metadata={
            "help": "8: linear layers and embeddings keep their weights in 8 bits, opened in dtype for each product, "
            "and written back rounded by chance."
        },
    )
    weight_group_size: int = field(
        default=256, metadata={"help": "Of weights in 8 bits, how many of a row share a scale."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that a saved model, tokenizer or data set brings along."}
    )


@dataclass
class DataArguments:
    """What it reads."""

    dataset: list[str] = field(
        default_factory=lambda: ["stdlib"],
        metadata={
            "help": "stdlib (the source text of this Python's standard library); a file, folder or glob of txt, md, "
            "jsonl, csv, parquet or arrow, plain or .gz, .xz, .zst, .bz2; a folder of save_to_disk; or hub:org/name "
            "(streamed). Several are mixed."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Shares of several data sets in what is trained on; without it, all of each."},
    )
    validation_dataset: str | None = field(
        default=None, metadata={"help": "Data to validate on, of any of these kinds, in place of a part of dataset."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set: en for c4."})
    text_column: str = field(
        default="text",
        metadata={
            "help": "Column that is read where data has columns: texts, lists of texts, or messages with role and "
            "content."
        },
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "Encoding of text, JSON and CSV files; by default what a byte order mark says, or UTF-8."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read local files as a stream instead of packing them first."}
    )
    packing: bool = field(
        default=True, metadata={"help": "Lay documents end to end; false for one document an example, padded."}
    )
    ignore_data_changes: bool = field(
        default=False, metadata={"help": "Resume although the data is not what the run began with."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Path or hub:org/name of a tokenizer; by default the saved model's, else a BPE trained on the data "
            "and cached."
        },
    )
    block_size: int = field(default=256, metadata={"help": "Tokens per training example."})
    validation_blocks: int = field(
        default=200, metadata={"help": "Examples held out for validation, at most a tenth of a corpus."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset, str):
            self.dataset = [self.dataset]


ALL, COORDINATES, NOTHING = "all", "coordinates", "nothing"  # of keep_gradients


@dataclass
class MethodArguments:
    """How it is optimized, by any command that trains."""

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
    proj_type: str = field(
        default="std",
        metadata={
            "help": "Side of a matrix that is projected: std, the shorter; reverse_std, the longer; left or right."
        },
    )
    sparsity: float | None = field(
        default=None, metadata={"help": "Share of zeros in the target matrices, of optimizers and layers with masks."}
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
    target_modules: list[str] = field(
        default_factory=lambda: list(DEFAULT_TARGETS),
        metadata={
            "help": "Parts of, or regular expressions for, the names of the layers that get a rank or a mask; or "
            "all-linear."
        },
    )
    optimizer_args: Keywords | None = field(
        default=None,
        metadata={"help": 'Further keywords of the optimizer, as a mapping: {"error_feedback": "8bit"}.'},
    )
    keep_gradients: str = field(
        default=ALL,
        metadata={
            "help": "all: until the step has used them. coordinates: of a matrix with a subspace (GaLore's) or a mask "
            "its coordinates. nothing: each parameter moves in the backward pass, and its gradient is freed at once."
        },
    )
    clip_in_two_passes: bool = field(
        default=False,
        metadata={
            "help": "With keep_gradients: nothing, clip by max_grad_norm all the same: forward and backward run twice "
            "over each batch, first for the norm of all gradients."
        },
    )


@dataclass
class OptimizerArguments(MethodArguments):
    """How a pretraining is optimized."""

    art_every: int | None = field(
        default=None,
        metadata={
            "help": "Of hyper_sparse_adamw, steps between measurements without the smallest weights: they are pruned "
            "when the loss is as low without them, or at its prune_at."
        },
    )
    lr_restart_every: int | None = field(
        default=None,
        metadata={
            "help": "Steps between restarts of a cosine schedule, for ReLoRA as many as between its merges; replaces "
            "lr_scheduler_type, and reads min_lr_rate of lr_scheduler_kwargs."
        },
    )
    lr_restart_warmup: int = field(
        default=100, metadata={"help": "Steps in which the learning rate rises again after each restart."}
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "A saved model whose predictions are imitated: for cast, the dense one that it begins with."},
    )
    distill: float = field(default=1 / 3, metadata={"help": "The teacher's share of the loss; the rest is the data's."})


@dataclass
class RunArguments(TrainingArguments):
    """``TrainingArguments`` with other defaults: TensorBoard on, non-finite losses never hidden."""

    # HfArgumentParser reads unions by position: None must come first here.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="tensorboard", metadata={"help": "Where metrics are logged: tensorboard, wandb, none, ..."}
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


Model = TypeVar("Model")
Data = TypeVar("Data")
Method = TypeVar("Method", bound=MethodArguments)


@dataclass(frozen=True)
class Settings(Generic[Model, Data, Method]):
    """A resolved configuration of a command that trains.

    Attributes:
        command: the word behind ``gracile``.
        groups: the dataclasses whose fields are its keys.
        without_file: the embedded configuration that stands in where none is given.
        given: keys that the file or the command line has.
        values: every key, as it was read.
        left_out: keys of a recipe for another optimizer than the command line names.
    """

    command: ClassVar[str]
    groups: ClassVar[tuple[Any, ...]]
    without_file: ClassVar[str | None] = None

    name: str
    model: Model
    data: Data
    optimizer: Method
    run: RunArguments
    given: dict[str, Any]
    values: dict[str, Any]
    left_out: tuple[str, ...] = ()

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, flat, as YAML can hold it: a configuration that runs again. Paths are absolute."""
        kept = {key: plain(value) for key, value in self.values.items() if key not in NOT_KEPT}
        for key in kept.keys() & set(PATH_KEYS):
            value = kept[key]
            kept[key] = [_from_anywhere(one) for one in value] if isinstance(value, list) else _from_anywhere(value)
        return kept


AnySettings = Settings[Any, Any, Any]


@dataclass(frozen=True)
class Config(Settings[ModelArguments, DataArguments, OptimizerArguments]):
    """A resolved configuration of ``gracile pretrain``."""

    command = "pretrain"
    groups = (ModelArguments, DataArguments, OptimizerArguments, RunArguments)
    without_file = "quickstart"


def _from_anywhere(path: Any) -> Any:
    """A path that names the same from another folder; anything else as it is."""
    if isinstance(path, str) and path not in NAMED and Path(path).exists():
        return str(Path(path).absolute())
    return path


def plain(value: Any) -> Any:
    """A value in a form that YAML can hold; mappings as JSON text."""
    value = getattr(value, "value", value)  # of a choice
    if isinstance(value, dict):
        return json.dumps(value)
    return value if isinstance(value, (int, float, bool, list, type(None))) else str(value)
