"""``gracile list``: every optimizer, layer and embedded configuration. Imports no transformers."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence

from ..registry import LAYERS, OPTIMIZERS, LayerEntry, OptimizerEntry, recipes
from ..validation import nearest

HEAD = """\
usage: gracile list [optimizers | layers | recipes]

What a configuration can name: optimizers (--optimizer), layers (--layer) and the embedded configurations themselves.
"""


def methods(entries: Iterable[OptimizerEntry | LayerEntry]) -> list[str]:
    """Optimizers or layers, a line or two each."""
    return [row(entry.name, f"{entry.summary} {entry.paper}, arXiv:{entry.arxiv}") for entry in entries]


def row(name: str, text: str) -> str:
    """A name and, beside it, a text that is wrapped."""
    head, gap = f"  {name}", " " * 32
    body = textwrap.wrap(text, width=72, break_long_words=False)
    lines = [f"{head:<32}{body[0]}" if len(head) < 31 else f"{head}\n{gap}{body[0]}"]
    return "\n".join(lines + [gap + line for line in body[1:]])


def listed(kind: str) -> str:
    """A section of the list."""
    if kind == "recipes":
        return "\n".join(["recipes:", *(row(entry.name, entry.summary) for entry in recipes().values())])
    entries = OPTIMIZERS if kind == "optimizers" else LAYERS
    return "\n".join([f"{kind}:", *methods(entries.values())])


KINDS = ("optimizers", "layers", "recipes")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad input, with one line that says why."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if any(a in ("-h", "--help") for a in arguments):
        print(HEAD.rstrip())
        return 0
    for kind in arguments:
        if kind not in KINDS:
            print(f"gracile list: there are no {kind!r} to list; {nearest(kind, KINDS)}", file=sys.stderr)
            return 2
    print("\n\n".join(listed(kind) for kind in arguments or KINDS))
    return 0
