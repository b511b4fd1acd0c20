"""No module of the package imports itself, through others: nor does a folder of ``FOLDERS``.

Imports inside functions and under ``TYPE_CHECKING`` count. ``from package import name`` is an import of the module
``package.name`` where there is one, else of ``package`` itself.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("adapters", "optim", "models", "selections", "spectra", "train")


def modules():
    """Every module of the package: its parts without ``gracile``, and its file."""
    files = [*ROOT.glob("*.py"), *(path for folder in (*FOLDERS, "configs") for path in (ROOT / folder).rglob("*.py"))]
    found = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    return found


def imported(module, source, is_package, known):
    """The modules of the package that one of them imports."""
    package = module if is_package else module[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
            bases = [(name[1:], ()) for name in names if name[0] == "gracile"]
        elif isinstance(node, ast.ImportFrom):
            above = ("gracile", *package)[: len(package) + 2 - node.level] if node.level else ()
            base = (*above, *(node.module.split(".") if node.module else ()))
            bases = [(base[1:], (alias.name,)) for alias in node.names] if base[:1] == ("gracile",) else []
        else:
            continue
        for base, name in bases:
            yield base + name if base + name in known else base


def graph():
    known = modules()
    return {
        module: set(imported(module, path.read_text(encoding="utf-8"), path.name == "__init__.py", known)) - {module}
        for module, path in known.items()
    }


def folder_of(module):
    """What a module belongs to: a folder of one of ``FOLDERS``, or itself where it lies in none."""
    return module[:2] if len(module) > 2 else module


def folders():
    edges = {}
    for module, targets in graph().items():
        own = folder_of(module)
        edges.setdefault(own, set()).update(other for other in map(folder_of, targets) if other != own)
    return edges


def cycles(edges):
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(".".join(name) for name in group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def test_no_cycle_of_modules():
    assert cycles(graph()) == []


def test_no_cycle_of_folders():
    assert cycles(folders()) == []


def test_all_modules_are_looked_at():
    known = modules()
    assert {("registry",), ("train", "pretrain"), ("optim", "low_rank", "galore"), ("models", "layers")} <= known.keys()
    assert len(known) > 100
    assert ("optim",) in graph()[("registry",)]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..errors import BadInput", ("train", "errors")),
        ("from . import layout", ("train", "engines", "layout")),
        ("from ...optim import Lion", ("optim",)),
        ("def f():\n    import gracile.train.pretrain", ("train", "pretrain")),
        ("from gracile.train import pretrain", ("train", "pretrain")),
        ("from ... import optim", ("optim",)),
    ],
)
def test_an_import_is_seen(source, found):
    assert list(imported(("train", "engines", "new"), source, False, modules())) == [found]


def test_a_cycle_is_found():
    assert cycles({("a",): {("b",)}, ("b",): {("c",)}, ("c",): {("a",)}, ("d",): {("a",)}}) == [["a", "b", "c"]]
