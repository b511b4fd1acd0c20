"""Names of models, tokenizers and data sets: paths here, or names on the Hugging Face hub.

A path never asks the hub: whoever owns its name there would supply what is not here. A name on the hub is written
``hub:org/name``; those that the recipes use need no mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .errors import BadInput

MARK = "hub:"
OF_RECIPES = ("allenai/c4", "t5-base")
RUNS = "runs"  # where recipes write, each into a folder of its own name


@dataclass(frozen=True)
class Source:
    """Where something is loaded from, as ``from_pretrained`` and ``load_dataset`` take it."""

    name: str
    on_hub: bool


def source_of(key: str, given: str) -> Source:
    """The source that ``given``, the value of ``key``, stands for.

    Raises:
        BadInput: for a path that does not exist.
    """
    if given.startswith(MARK):
        name = given.removeprefix(MARK)
        if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise BadInput(f"{key} {given!r} is no name on the hub; they look like {MARK}org/name")
        return Source(name, on_hub=True)
    path = Path(given).expanduser()
    if path.exists():
        return Source(str(path), on_hub=False)
    if given in OF_RECIPES:
        return Source(given, on_hub=True)
    raise BadInput(f"{key} {given!r} does not exist; {_way_out(path, given)}")


def _way_out(path: Path, given: str) -> str:
    from ..registry import recipes

    if path.parent.name == RUNS and path.name in recipes():
        return f"run `gracile {recipes()[path.name].command} {path.name}` first, which writes it"
    plain = not path.is_absolute() and not given.startswith((".", "~")) and given.count("/") <= 1
    hub = f", or, for the hub's, say {MARK}{given}" if plain else ""
    return f"give a path that does{hub}"


def load(kind: type[Any], key: str, given: str, trust_remote_code: bool | None, **keywords: Any) -> Any:
    """``kind.from_pretrained`` of what ``given`` names; from the hub only where it names the hub. Code that it brings
    along is run only if that is trusted; None is for a command that never runs any.

    Raises:
        BadInput: for whatever makes it fail, code that is not trusted included.
    """
    source = source_of(key, given)
    local = {} if source.on_hub else {"local_files_only": True}
    try:
        return kind.from_pretrained(source.name, trust_remote_code=bool(trust_remote_code), **local, **keywords)
    except Exception as error:  # every kind of network, hub and file error means the same to the user
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            way = "" if trust_remote_code is None else "; --trust_remote_code true would run it"
            reason = f"it comes with code of its own, which is not run{way}"
        raise BadInput(f"{key} {given!r} cannot be loaded: {reason}") from None


def config_of(key: str, given: str, trust_remote_code: bool | None) -> Any:
    """The configuration of a saved model."""
    return load(AutoConfig, key, given, trust_remote_code)


def model_of(key: str, given: str, trust_remote_code: bool | None, **keywords: Any) -> Any:
    """A saved causal language model."""
    return load(AutoModelForCausalLM, key, given, trust_remote_code, **keywords)


def tokenizer_of(key: str, given: str, trust_remote_code: bool | None) -> Any:
    """A saved tokenizer."""
    return load(AutoTokenizer, key, given, trust_remote_code)
