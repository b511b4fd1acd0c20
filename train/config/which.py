"""Which command a configuration is for, where a command takes those of several: its keys say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...models.llama import SIZES
from ...registry import recipes
from ...validation import nearest
from ..errors import BadInput
from .arguments import AnySettings, Config
from .finetune_arguments import FinetuneConfig
from .parser import check_keys, field_names, keys_on_line, load_settings, plain_key, read_yaml, taken_apart

KINDS: dict[str, type[AnySettings]] = {kind.command: kind for kind in (Config, FinetuneConfig)}


def load_either(argv: Sequence[str], command: str | None = None, needs_output_dir: bool = True) -> AnySettings:
    """``[CONFIG.yaml] [--key value ...]`` of ``gracile pretrain`` or ``gracile finetune``.

    Args:
        command: which of the two, where it is said.

    Raises:
        BadInput: for a configuration of neither, one that could be of either, or a bad one.
    """
    return load_settings(kind_of(argv, command), argv, needs_output_dir)


def kind_of(argv: Sequence[str], command: str | None = None) -> type[AnySettings]:
    """The kind of the configuration that arguments give: a recipe has its own; of a file, a key that only one command
    has decides, else a model by its size, which only a pretraining takes.

    Raises:
        BadInput: where none of it decides, or keys of both are given.
    """
    if command is not None:
        if command not in KINDS:
            raise BadInput(f"command must be one of {', '.join(KINDS)}, got {command!r}; {nearest(command, KINDS)}")
        return KINDS[command]
    source, rest = taken_apart(argv, *KINDS.values())
    settings, is_recipe = ({}, False) if source is None else read_yaml(source)
    if is_recipe:
        return KINDS[recipes()[str(source)].command]
    on_line = keys_on_line(rest)
    known = {name: field_names(kind) for name, kind in KINDS.items()}
    everything = set().union(*known.values())
    check_keys(everything, settings, f"in {source}")
    check_keys(everything, on_line, "on the command line")
    return KINDS[_decided(source, [plain_key(key) for key in (*settings, *on_line)], known, settings, rest)]


def _decided(
    source: str | None, keys: list[str], known: Mapping[str, set[str]], settings: Mapping[str, Any], rest: Sequence[str]
) -> str:
    own = {
        name: [key for key in keys if key in known[name] and not any(key in known[one] for one in known if one != name)]
        for name in known
    }
    decided = [name for name, found in own.items() if found]
    if len(decided) > 1:
        told = " and ".join(f"{own[name][0]}, a key of gracile {name}" for name in decided)
        raise BadInput(f"{source or 'the command line'} has {told}; leave one of them out")
    if decided:
        return decided[0]
    if source is None or _model(settings, rest) in (None, *SIZES):
        return Config.command
    raise BadInput(
        f"{source} could be of gracile {' or of gracile '.join(KINDS)}: no key of one of them alone is in it; say "
        f"which, as in --command {FinetuneConfig.command}"
    )


def _model(settings: Mapping[str, Any], rest: Sequence[str]) -> Any:
    found = settings.get("model")
    for word, after in zip(rest, [*rest, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name == "--model":
            found = value if equals else after
    return found
