"""Instructions that every Python brings along: what the functions of the standard library do, as their docstrings say.

A prompt is a question about a function, the response the first sentence of its docstring. Real text, and no download.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "stdlib-docstrings"
LEAST, MOST = 20, 200  # characters of a response


def questions(file: Path) -> Iterator[dict[str, Any]]:
    """A prompt and its response for each public function of a source file that has a docstring."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # some are there to be wrong, or in another encoding
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        told = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if LEAST <= len(told) <= MOST:
            keys = ", ".join(argument.arg for argument in node.args.args if argument.arg not in ("self", "cls"))
            yield {"prompt": f"What does {file.stem}'s {node.name}({keys}) do?", "response": told}
