"""Reads a configuration: flat keys from a YAML file, overridden from the command line, by one parser."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ...registry import OPTIMIZERS
from ...validation import nearest
from ..errors import BadInput
from .arguments import Config, DataArguments, Keywords, ModelArguments, OptimizerArguments, RunArguments

GROUPS: Any = (ModelArguments, DataArguments, OptimizerArguments, RunArguments)
# Keys that an optimizer has defaults of its own for.
METHOD_KEYS = (
    "scale", "update_proj_gap", "proj_type", "subspace_method", "update_every", "drop_fraction", "t_end", "art_every",
    "optimizer_args", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
# Keys of the Trainer that would be without effect here, and ours in their place.
NOT_READ = {
    "optim": "optimizer, as in --optimizer galore_adamw",
    "optim_args": 'optimizer_args, as in --optimizer_args \'{"error_feedback": "8bit"}\'',
    "optim_target_modules": "target_modules, as in --target_modules attn mlp",
}
# Recipes have names that every supported transformers knows; what a newer one calls otherwise, it warns of.
NEWER_NAMES = {"gradient_checkpointing": "activation_checkpointing"}
# What a run writes into its folder as run.yaml: a configuration, and what it was read with.
RUN_FILE_KEYS = {"gracile", "data", "config"}
# What an error message calls a type; and, by key, its example of a mapping.
KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}
EXAMPLES = {
    "model_overrides": '{"num_hidden_layers": 2}',
    "layer_args": '{"density": 0.03}',
    "optimizer_args": '{"error_feedback": "8bit"}',
}


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are one line and no usage screen."""

    @classmethod
    def of(cls, command: str, text: str) -> OneLineParser:
        """A parser of ``gracile COMMAND``, which takes the keys of a configuration besides its own."""
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
            key, kind, value = found.groups()
            message = f"{key} must be {KINDS.get(kind, 'of type ' + kind)}, got {value}"
            if kind == Keywords.__name__:
                message = f"{key} must be a mapping such as {EXAMPLES[key]}, got {ast.literal_eval(value)}"
        found = re.match(r"argument --([a-z_0-9]+)\S*: expected one argument", message)
        if found:
            message = f"{found[1]} needs a value, as in --{found[1]}=VALUE"
        raise BadInput(" ".join(message.split()))


class _Parser(OneLineParser, HfArgumentParser):
    """The dataclasses as flags."""


def field_names() -> set[str]:
    return {f.name for group in GROUPS for f in dataclasses.fields(group) if f.init}


def _empty_by_default() -> set[str]:
    return {f.name for group in GROUPS for f in dataclasses.fields(group) if f.default_factory is list}


def load_config(argv: Sequence[str], needs_output_dir: bool = True) -> Config:
    """``[CONFIG.yaml] [--key value ...]`` to a configuration; without a file, the embedded quickstart.

    Raises:
        BadInput: for a file that cannot be read, an unknown key or a value of the wrong type.
    """
    argv = [a for a in argv if not a.startswith("--local_rank=")]  # DeepSpeed's launcher puts it before the file
    source = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    settings, is_recipe = _read_yaml(source)
    settings = _by_newer_names(settings) if is_recipe else settings
    _check_keys(settings, f"in {source}")
    _check_keys([re.split("=", a[2:])[0].replace("-", "_") for a in argv if a.startswith("--")], "on the command line")
    left_out = _of_another_optimizer(settings, argv) if is_recipe else []
    arguments = _as_flags({key: value for key, value in settings.items() if key not in left_out}) + argv
    namespace, stray = _Parser(GROUPS, allow_abbrev=False, add_help=False).parse_known_args(arguments)
    if stray:
        raise BadInput(f"unexpected argument {stray[0]!r}; give values as --key value")
    if needs_output_dir and not _was_given("output_dir", arguments):
        raise BadInput("output_dir is not set; choose one with --output_dir")
    given = {k: v for k, v in vars(namespace).items() if _was_given(k, arguments)}
    vars(namespace).update({k: v for k, v in _adam_defaults(namespace.optimizer).items() if k not in given})
    deepspeed = namespace.deepspeed
    if isinstance(deepspeed, str) and not deepspeed.startswith("{") and not Path(deepspeed).is_file():
        raise BadInput(f"deepspeed {deepspeed!r} does not exist; give the path of a DeepSpeed configuration")
    try:
        model, data, optimizer, run = (_filled(group, namespace) for group in GROUPS)
    except (ValueError, ImportError, OSError) as error:  # TrainingArguments checks its own values
        raise BadInput(" ".join(str(error).split())) from None
    return Config(Path(source).stem, model, data, optimizer, run, given, dict(vars(namespace)), tuple(left_out))


def _by_newer_names(settings: dict[str, Any]) -> dict[str, Any]:
    known = field_names()
    newer = {old: new for old, new in NEWER_NAMES.items() if new in known}
    return {newer.get(key, key): value for key, value in settings.items()}


def _of_another_optimizer(settings: dict[str, Any], argv: Sequence[str]) -> list[str]:
    """The keys of a recipe that are its optimizer's own, where the command line names another one: that one's defaults
    hold then."""
    named = OneLineParser(add_help=False, allow_abbrev=False)
    named.add_argument("--optimizer")
    chosen = named.parse_known_args(list(argv))[0].optimizer
    if chosen is None or chosen == settings.get("optimizer"):
        return []
    return [key for key in METHOD_KEYS if key in settings and not _was_given(key, list(argv))]


def _adam_defaults(optimizer: str) -> dict[str, float]:
    """The betas and eps of an optimizer's constructor, by their keys in a run: ``TrainingArguments`` has AdamW's."""
    entry = OPTIMIZERS.get(optimizer)
    if entry is None or entry.run_keys == "adafactor":
        return {}
    own = inspect.signature(entry.cls).parameters
    beta1, beta2 = own["betas"].default
    return {"adam_beta1": beta1, "adam_beta2": beta2} | ({"adam_epsilon": own["eps"].default} if "eps" in own else {})


def _filled(group: Any, namespace: argparse.Namespace) -> Any:
    return group(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(group) if f.init})


def _read_yaml(source: str) -> tuple[dict[str, Any], bool]:
    """What a file or an embedded recipe says, and whether it is a recipe."""
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
    if settings.keys() == RUN_FILE_KEYS and isinstance(settings["config"], dict):
        settings = settings["config"]
    return settings, not path.is_file()


def _check_keys(keys: Iterable[Any], where: str) -> None:
    known = field_names()
    for key in keys:
        if key in NOT_READ:
            raise BadInput(f"{key} {where} is not read: the key is {NOT_READ[key]}")
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
        if value == [] and key in _empty_by_default():
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
