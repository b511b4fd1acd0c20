"""The configuration of a run: flat keys from a YAML file, overridden from the command line.

Four dataclasses through ``transformers.HfArgumentParser``: the model, the data, the optimizer, and everything of
``transformers.TrainingArguments`` under its own names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ...target_modules import DEFAULT_TARGETS
from ...validation import nearest
from ..engines.deepspeed_ops import skip_inference_reduce
from ..errors import BadInput


@dataclass
class ModelArguments:
    """What is trained."""

    model: str = field(default="2m", metadata={"help": "A size name (2m, 9m, ... 7b) or the path of a saved model."})
    model_overrides: str | None = field(
        default=None, metadata={"help": 'Fields of a size changed, as a mapping: {"num_hidden_layers": 2}.'}
    )
    layer: str | None = field(
        default=None,
        metadata={
            "help": "Layers that store less in place of the target linear layers: sltrain, sst, relora, low_rank, "
            "maestro, autosparse, nm or cast; or as much, in more places: parallel, factorised or doped; rank, "
            "sparsity and target_modules are theirs."
        },
    )
    layer_args: str | None = field(
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
        metadata={"help": "Name or path; by default the saved model's, else a BPE trained on the data and cached."},
    )
    block_size: int = field(default=256, metadata={"help": "Tokens per training example."})
    validation_blocks: int = field(
        default=200, metadata={"help": "Examples held out for validation, at most a tenth of a corpus."}
    )


@dataclass
class OptimizerArguments:
    """How it is optimized."""

    optimizer: str = field(
        default="galore_adamw",
        metadata={
            "help": "adamw, lion, galore_adamw, galore_adamw_8bit, galore_adafactor, galore_lion, galore_plus_adamw, "
            "fira_adamw, gradnormlorp_adamw, dct_adamw, apollo_adamw, ldadamw, sltrain_adamw, sltrain_adamw_8bit, "
            "sst_adamw, relora_adamw, sr_ste_adamw, cast_adams, sparse_adamw, set_adamw, rigl_adamw, srigl_adamw, "
            "block_sparse_adamw, hyper_sparse_adamw or wgsef_adamw."
        },
    )
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
        metadata={"help": "Parts of, or regular expressions for, the names of the layers that get a rank or a mask."},
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
    optimizer_args: str | None = field(
        default=None,
        metadata={"help": 'Further keywords of the optimizer, as a mapping: {"error_feedback": "8bit"}.'},
    )


@dataclass
class RunArguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of a run that reports: TensorBoard on, bad losses never hidden."""

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
        # Without this, processes launched together on CPUs would each train alone, into one folder.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu:
            os.environ.setdefault(
                "DS_ACCELERATOR", "cpu"
            )  # DeepSpeed, once imported, would say on stdout that it guesses
        if self.deepspeed is not None and self.use_cpu:
            skip_inference_reduce()
        super().__post_init__()
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world_size:
            raise ValueError(f"WORLD_SIZE is {launched} but only {self.world_size} process(es) found each other")


GROUPS: Any = (ModelArguments, DataArguments, OptimizerArguments, RunArguments)


@dataclass(frozen=True)
class Config:
    """A resolved configuration."""

    name: str
    model: ModelArguments
    data: DataArguments
    optimizer: OptimizerArguments
    run: RunArguments
    given: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """The keys that make two runs the same run: what cannot change between a run and its resumption."""
        return {k: v for part in (self.model, self.data, self.optimizer) for k, v in dataclasses.asdict(part).items()}

    def resolved(self) -> dict[str, Any]:
        """Flat keys that reproduce the run, in a form that YAML can hold."""
        return {**self.given, **self.identity()}


def mapping(key: str, text: str | None, example: str) -> dict[str, Any]:
    """The value of a key that takes a mapping: empty where it is not given.

    Raises:
        BadInput: for anything else than a mapping in JSON.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadInput(f"{key} must be a mapping such as {example}, got {text}")
    return value


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are one line and no usage screen."""

    @classmethod
    def of(cls, command: str, text: str) -> OneLineParser:
        """For ``gracile COMMAND``, whose other keys are those of a configuration."""
        return cls(
            prog=f"gracile {command}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            usage=f"gracile {command} [CONFIG.yaml | NAME] [options] [--key value ...]",
        )

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument --([a-z_0-9]+)\S*: invalid (\S+) value: (.*)", message)
        if found:
            kind = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}
            message = f"{found[1]} must be {kind.get(found[2], 'of type ' + found[2])}, got {found[3]}"
        found = re.match(r"argument --([a-z_0-9]+)\S*: expected one argument", message)
        if found:
            message = f"{found[1]} needs a value, as in --{found[1]}=VALUE"
        raise BadInput(message)


class _Parser(OneLineParser, HfArgumentParser):
    """The dataclasses as flags."""


def field_names() -> set[str]:
    return {f.name for group in GROUPS for f in dataclasses.fields(group) if f.init}


def load_config(argv: Sequence[str], needs_output_dir: bool = True) -> Config:
    """``[CONFIG.yaml] [--key value ...]`` to a configuration; without a file, the embedded quickstart.

    Raises:
        BadInput: for a file that cannot be read, an unknown key or a value of the wrong type.
    """
    argv = [a for a in argv if not a.startswith("--local_rank=")]  # DeepSpeed's launcher puts it before the file
    source = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    settings = _read_yaml(source)
    _check_keys(settings, f"in {source}")
    _check_keys([re.split("=", a[2:])[0].replace("-", "_") for a in argv if a.startswith("--")], "on the command line")
    parser = _Parser(GROUPS, allow_abbrev=False, add_help=False)
    arguments = _as_flags(settings) + argv
    namespace, stray = parser.parse_known_args(arguments)
    if stray:
        raise BadInput(f"unexpected argument {stray[0]!r}; give values as --key value")
    if needs_output_dir and not _was_given("output_dir", arguments):
        raise BadInput("output_dir is not set; choose one with --output_dir")
    given = {k: v for k, v in vars(namespace).items() if _was_given(k, arguments)}
    deepspeed = namespace.deepspeed
    if isinstance(deepspeed, str) and not deepspeed.startswith("{") and not Path(deepspeed).is_file():
        raise BadInput(f"deepspeed {deepspeed!r} does not exist; give the path of a DeepSpeed configuration")
    try:
        model, data, optimizer, run = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (ValueError, ImportError, OSError) as error:  # TrainingArguments checks its own values
        raise BadInput(" ".join(str(error).split())) from None
    return Config(Path(source).stem, model, data, optimizer, run, _plain(given))


def _read_yaml(source: str) -> dict[str, Any]:
    embedded = resources.files(f"{__package__.split('.')[0]}.configs")
    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif embedded.joinpath(f"{source}.yaml").is_file():
        text = embedded.joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    else:
        names = [entry.name.removesuffix(".yaml") for entry in embedded.iterdir() if entry.name.endswith(".yaml")]
        raise BadInput(f"no configuration {source!r}: neither a file nor an embedded one; {nearest(source, names)}")
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise BadInput(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise BadInput(f"{source} must hold `key: value` lines, got a {type(settings).__name__}")
    return settings


def _check_keys(keys: Any, where: str) -> None:
    known = field_names()
    for key in keys:
        plain = str(key).removeprefix("no_") if str(key).startswith("no_") else str(key)
        if key not in known and plain not in known:
            raise BadInput(f"unknown key {str(key)!r} {where}; {nearest(key, known)}")


def _as_flags(settings: dict[str, Any]) -> list[str]:
    """YAML values as command-line flags, so that both are converted and checked by the same parser.

    YAML 1.1 reads ``1e-3`` as a string; as a flag it is a number again.
    """
    flags: list[str] = []
    for key, value in settings.items():
        if value is None:
            continue
        if value == []:
            raise BadInput(f"{key} is an empty list; leave it out for its default")
        if isinstance(value, list):
            flags += [f"--{key}", *(str(item) for item in value)]
        else:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _was_given(key: str, arguments: list[str]) -> bool:
    dashed = key.replace("_", "-")
    return any(a.split("=")[0] in (f"--{key}", f"--{dashed}", f"--no_{key}", f"--no-{dashed}") for a in arguments)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, (int, float, bool, list, type(None))) else str(v) for k, v in values.items()}
