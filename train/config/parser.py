"""Reads a configuration: flat keys from a YAML file, overridden from the command line, by one parser."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import glob
import inspect
import json
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from ...registry import LAYERS, OPTIMIZERS, recipes
from ...validation import nearest
from ..errors import BadInput
from .arguments import NAMED, PATH_KEYS, AnySettings, Config, Keywords, plain

Kind = TypeVar("Kind", bound=AnySettings)
# Keys that an optimizer has defaults of its own for.
METHOD_KEYS = (
    "scale", "update_proj_gap", "proj_type", "subspace_method", "update_every", "drop_fraction", "t_end", "art_every",
    "optimizer_args", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip
# Keys that choose what of a model is trained: AdamW trains it, where nothing else is said.
PARTS = ("adapter", "adapter_from", "selection")
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
    "adapter_args": '{"r": 16}',
    "selection_args": '{"share": 0.1}',
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


def field_names(kind: type[AnySettings] = Config) -> set[str]:
    return {f.name for group in kind.groups for f in dataclasses.fields(group) if f.init}


def _check_deepspeed(path: Path) -> None:
    if not path.is_file():
        raise BadInput(f"deepspeed {str(path)!r} does not exist; give the path of a DeepSpeed configuration")
    try:
        json.loads(_text_of(path))
    except ValueError as error:
        raise BadInput(f"deepspeed {str(path)!r} is not JSON: {error}") from None


def _empty_by_default(kind: type[AnySettings]) -> set[str]:
    return {f.name for group in kind.groups for f in dataclasses.fields(group) if f.default_factory is list}


def load_config(argv: Sequence[str], needs_output_dir: bool = True) -> Config:
    """``[CONFIG.yaml] [--key value ...]`` of ``gracile pretrain``; without a file, the embedded quickstart."""
    return load_settings(Config, argv, needs_output_dir)


def load_settings(kind: type[Kind], argv: Sequence[str], needs_output_dir: bool = True) -> Kind:
    """``[CONFIG.yaml] [--key value ...]`` to a configuration of ``kind``.

    Raises:
        BadInput: for a file that cannot be read, an unknown key or a value of the wrong type.
    """
    argv = [a for a in argv if not a.startswith("--local_rank=")]  # DeepSpeed's launcher puts it before the file
    parser = _parser_of(kind)
    found, argv = taken_apart(argv, kind)
    source = found or kind.without_file
    settings, is_recipe = ({}, False) if source is None else read_yaml(source)
    if is_recipe and recipes()[str(source)].command != kind.command:
        raise BadInput(f"{source} is a recipe of gracile {recipes()[str(source)].command}, and not of {kind.command}")
    settings = _by_newer_names(settings, kind) if is_recipe else settings
    check_keys(field_names(kind), settings, f"in {source}")
    check_keys(field_names(kind), keys_on_line(argv), "on the command line")
    left_out = _of_another_optimizer(settings, argv) if is_recipe else []
    arguments = _as_flags({k: v for k, v in settings.items() if k not in left_out}, parser, kind) + argv
    arguments = _with_parts(arguments)
    namespace, stray = parser.parse_known_args(arguments)
    if stray:
        raise BadInput(f"unexpected argument {stray[0]!r}; give values as --key value")
    if needs_output_dir and not (_was_given("output_dir", arguments) and namespace.output_dir.strip()):
        raise BadInput("output_dir is not set; choose one with --output_dir")
    given = {k: v for k, v in vars(namespace).items() if _was_given(k, arguments)}
    if given.get("eval_steps") == 0:
        raise BadInput("eval_steps must be above 0, got 0; eval_strategy: no turns evaluations off")
    vars(namespace).update({k: v for k, v in _adam_defaults(namespace.optimizer).items() if k not in given})
    deepspeed = namespace.deepspeed
    if isinstance(deepspeed, str) and not deepspeed.startswith("{"):
        _check_deepspeed(Path(deepspeed))
    try:
        model, data, optimizer, run = (_filled(group, namespace) for group in kind.groups)
    except (ValueError, TypeError, ImportError, OSError) as error:  # TrainingArguments checks its own values
        raise BadInput(" ".join(str(error).split())) from None
    if "disable_tqdm" not in given and not sys.stderr.isatty():
        run.disable_tqdm = True
    name = kind.command if source is None else Path(source).stem
    return kind(name, model, data, optimizer, run, given, dict(vars(namespace)), tuple(left_out))


def _parser_of(kind: type[AnySettings]) -> Any:
    return _Parser(kind.groups, allow_abbrev=False, add_help=False)


def taken_apart(argv: Sequence[str], *kinds: type[AnySettings]) -> tuple[str | None, list[str]]:
    """The configuration, wherever it stands among flags of ``kinds``, and the other arguments."""
    actions = [action for kind in kinds for action in _parser_of(kind)._actions]
    flags = {text: action for action in actions for text in action.option_strings}
    rest: list[str] = []
    source, action, taken = None, None, 0  # the flag before, and how many values of it have been seen
    for word in argv:
        if word.startswith("--"):
            action, taken = (None if "=" in word else flags.get(word, _ANY)), 0
        elif source is None and not _is_value(word, action, taken):
            source = word
            continue
        taken += not word.startswith("--")
        rest.append(word)
    return source, rest


_ANY = argparse.Action([], "any")  # of an unknown flag, which is refused later


def _is_value(word: str, action: argparse.Action | None, taken: int) -> bool:
    """Whether a word belongs to the flag before it."""
    if action is None or action.nargs == 0:
        return False
    if action.nargs in ("+", "*"):
        return not (taken and word.endswith((".yaml", ".yml")))
    if action.nargs == "?":  # of a flag that is true or false
        return taken == 0 and not (word.endswith((".yaml", ".yml")) or word in recipes())
    return taken == 0


def keys_on_line(argv: Sequence[str]) -> list[str]:
    """The keys that arguments give values to."""
    return [a[2:].split("=")[0].replace("-", "_") for a in argv if a.startswith("--")]


def _parted(key: str) -> tuple[str, str] | None:
    """``optimizer_args.block_size`` as the two names that it has."""
    whole, dot, part = key.partition(".")
    return (whole, part) if dot and whole in EXAMPLES and part else None


def _with_parts(arguments: list[str]) -> list[str]:
    """The arguments, with ``--optimizer_args.KEY VALUE`` taken into the mapping ``--optimizer_args``."""
    found: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        parted = _parted(name[2:]) if word.startswith("--") else None
        if parted is None:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise BadInput(f"{name[2:]} needs a value, as in {name}=VALUE")
        found.setdefault(parted[0], {})[parted[1]] = _scalar(value)
    for whole, parts in found.items():
        given: dict[str, Any] = {}
        for i, word in enumerate(rest):
            if word.split("=")[0] == f"--{whole}":
                text = word.partition("=")[2] or (rest[i + 1] if i + 1 < len(rest) else "")
                given = _mapping(whole, text)
        rest.append(f"--{whole}={json.dumps({**given, **parts})}")
    return rest


def _mapping(key: str, text: str) -> dict[str, Any]:
    try:
        return Keywords(text)
    except ValueError:
        raise BadInput(f"{key} must be a mapping such as {EXAMPLES[key]}, got {text}") from None


def _scalar(text: str) -> Any:
    """What YAML reads, numbers such as 1e-3 among them."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text) if text in ("null", "true", "false", "True", "False") else text


def _by_newer_names(settings: dict[str, Any], kind: type[AnySettings]) -> dict[str, Any]:
    known = field_names(kind)
    newer = {old: new for old, new in NEWER_NAMES.items() if new in known}
    return {newer.get(key, key): value for key, value in settings.items()}


def _of_another_optimizer(settings: dict[str, Any], argv: Sequence[str]) -> list[str]:
    """The keys of a recipe that are its optimizer's own, where the command line names another one, whose defaults hold
    then; or chooses a part of the model to train, where the recipe's optimizer is for all of it."""
    given = keys_on_line(argv)
    if "optimizer" not in given and any(key in PARTS and key not in settings for key in given):
        return [key for key in ("optimizer", "rank", *METHOD_KEYS) if key in settings and key not in given]
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


def defaults(optimizer: str, kind: type[AnySettings] = Config) -> dict[str, Any]:
    """Every key as run.yaml would hold it where nothing but the optimizer is given."""
    namespace = _parser_of(kind).parse_args([])
    return {key: plain(value) for key, value in (vars(namespace) | _adam_defaults(optimizer)).items()}


def _filled(group: Any, namespace: argparse.Namespace) -> Any:
    return group(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(group) if f.init})


def read_yaml(source: str) -> tuple[dict[str, Any], bool]:
    """What a file or an embedded recipe says, and whether it is a recipe."""
    embedded = resources.files(f"{__package__.split('.')[0]}.configs")
    path = Path(source)
    if path.is_file():
        text = _text_of(path)
    elif embedded.joinpath(f"{source}.yaml").is_file():
        text = embedded.joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    else:
        names = [entry.name.removesuffix(".yaml") for entry in embedded.iterdir() if entry.name.endswith(".yaml")]
        raise BadInput(f"no configuration {source!r}: neither a file nor an embedded one; {nearest(source, names)}")
    try:
        settings = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise BadInput(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise BadInput(f"{source} must hold `key: value` lines, got a {type(settings).__name__}")
    if settings.keys() == RUN_FILE_KEYS and isinstance(settings["config"], dict):
        settings = settings["config"]
    if path.is_file():
        settings = {key: _beside(path, value) if key in PATH_KEYS else value for key, value in settings.items()}
    return settings, not path.is_file()


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def _beside(file: Path, value: Any) -> Any:
    """A path of a configuration file: relative to the file where that exists, else to the working directory."""
    if isinstance(value, list):
        return [_beside(file, item) for item in value]
    if not isinstance(value, str) or value in (*NAMED, "") or Path(value).is_absolute():
        return value
    beside = file.parent / value
    return str(beside) if beside.exists() or next(glob.iglob(str(beside)), None) else value


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, and not the last of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def check_keys(known: set[str], keys: Iterable[Any], where: str) -> None:
    """Refuse keys that are not among those that are known.

    Raises:
        BadInput: for the first of them.
    """
    for key in keys:
        if _parted(str(key)):
            continue
        if key in NOT_READ:
            raise BadInput(f"{key} {where} is not read: the key is {NOT_READ[key]}")
        if not {str(key), plain_key(key)} & known:
            raise BadInput(
                f"unknown key {str(key)!r} {where}; {_of_a_method(str(key), known) or nearest(str(key), known)}"
            )


def plain_key(key: Any) -> str:
    """``no_packing`` and ``adapter_args.r`` as the keys that they are of."""
    whole, *_ = _parted(str(key)) or (str(key),)
    return whole.removeprefix("no_")


def _of_a_method(key: str, known: set[str]) -> str | None:
    """How a key of optimizers or layers is given, if it is one."""
    ways = []
    if any(key in entry.accepts() for entry in OPTIMIZERS.values()):
        ways.append(f"of an optimizer it is --optimizer_args.{key}")
    if "layer_args" in known and any(key in inspect.signature(entry.cls).parameters for entry in LAYERS.values()):
        ways.append(f"of a layer it is --layer_args.{key}")
    return f"as a key {', '.join(ways)}" if ways else None


def _as_flags(settings: dict[str, Any], parser: argparse.ArgumentParser, kind: type[AnySettings]) -> list[str]:
    """YAML values as command-line flags, so that both are converted and checked by the same parser.

    YAML 1.1 reads ``1e-3`` as a string; as a flag it is a number again.
    """
    flags: list[str] = []
    many = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    for key, value in settings.items():
        if value is None:
            continue
        if value == [] and key in _empty_by_default(kind):
            continue
        if value == []:
            raise BadInput(f"{key} is an empty list; leave it out for its default")
        if isinstance(value, list) and key not in many:
            raise BadInput(f"{key} must be one value, got a list: {value}")
        if isinstance(value, list):
            flags += [f"--{key}", *(str(item) for item in value)]
        else:
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _was_given(key: str, arguments: list[str]) -> bool:
    dashed = key.replace("_", "-")
    return any(a.split("=")[0] in (f"--{key}", f"--{dashed}", f"--no_{key}", f"--no-{dashed}") for a in arguments)
