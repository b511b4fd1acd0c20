"""Layers by name: parts of names or regular expressions, each of which must match something."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from .validation import nearest

# The linear layers of a transformer block in the LLaMA, Qwen and GPT-2 families, as the papers choose them.
DEFAULT_TARGETS = ("attn", "mlp")


def targets(target_modules: str | Iterable[str], names: Collection[str]) -> list[str]:
    """Those of ``names`` that a list of patterns matches, or one regular expression for all of a name, in their order.

    Raises:
        ValueError: for no patterns, or one that matches none.
    """
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not patterns:
        raise ValueError("target_modules is empty; name the layers that it is for")
    matched = set().union(*found("target_modules", patterns, names, isinstance(target_modules, str)).values())
    return [name for name in names if name in matched]


def found(key: str, patterns: list[str], names: Collection[str], whole_name: bool) -> dict[str, set[str]]:
    """The names that each pattern matches, at least one.

    Args:
        key: what the user calls the patterns.
        whole_name: whether a pattern is a regular expression for all of a name, and not possibly a part of it.

    Raises:
        ValueError: for a pattern that matches none.
    """
    matches = {pattern: _matching(key, pattern, names, whole_name) for pattern in patterns}
    for pattern, matched in matches.items():
        if not matched:
            parts = {part for name in names for part in name.split(".") if not part.isdigit()}
            raise ValueError(f"{key}: {pattern!r} matches no trainable linear layer; {nearest(pattern, parts)}")
    return matches


def _matching(key: str, pattern: str, names: Iterable[str], whole_name: bool) -> set[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is not a regular expression ({error})") from None
    return {name for name in names if expression.fullmatch(name) or (not whole_name and pattern in name)}
