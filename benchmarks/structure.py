"""The shape of the package in numbers: files a folder, largest files and classes, private overrides, import circles.

    python benchmarks/structure.py             of this checkout
    python benchmarks/structure.py ../other    of another one, such as a worktree of an earlier version

Reads source files alone; nothing is imported.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("optim", "models", "train")


class Class(NamedTuple):
    name: str
    module: str
    lines: int
    bases: tuple[str, ...]
    methods: frozenset[str]


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name, without the package's own."""
    files = [path for folder in PACKAGES for path in sorted((root / folder).rglob("*.py"))]
    files += sorted(root.glob("[a-z]*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(root: Path) -> dict[str, set[str]]:
    """For each module those it imports when it is imported; imports inside functions are left out."""
    known = modules(root)
    found = {}
    for name, path in known.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found[name] = {target for node in _at_import(ast.parse(path.read_text())) for target in _targets(node, package)}
        found[name] = {target for target in found[name] if target in known} - {name}
    return found


def _at_import(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            yield node
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _at_import(node)


def _targets(node: ast.ImportFrom, package: list[str]) -> Iterator[str]:
    if not node.level:
        return
    base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
    yield ".".join(base)
    yield from (".".join([*base, alias.name]) for alias in node.names)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            members = [stack.pop()]
            while members[-1] != name:
                members.append(stack.pop())
            if len(members) > 1:
                found.append(sorted(members))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def rooms(graph: dict[str, set[str]], known: dict[str, Path], root: Path) -> dict[str, set[str]]:
    """The same between folders; files that stand at the top of a package count each for itself."""
    depth = {name: len(path.relative_to(root).parts) for name, path in known.items()}
    room = {name: name if depth[name] < 3 else str(known[name].parent.relative_to(root)) for name in known}
    found: dict[str, set[str]] = {place: set() for place in room.values()}
    for name, others in graph.items():
        found[room[name]] |= {room[other] for other in others} - {room[name]}
    return found


def classes(root: Path) -> list[Class]:
    found = []
    for name, path in modules(root).items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                methods = frozenset(item.name for item in node.body if isinstance(item, ast.FunctionDef))
                bases = tuple(ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases)
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append(Class(node.name, name, lines, bases, methods))
    return found


def private_overrides(root: Path) -> list[str]:
    """Methods of a leading underscore that a class has from a base of the package and defines again."""
    by_name = {found.name: found for found in classes(root)}

    def inherited(found: Class) -> set[str]:
        own: set[str] = set()
        for base in found.bases:
            if base in by_name and base != found.name:
                own |= by_name[base].methods | inherited(by_name[base])
        return own

    return [
        f"{found.module}.{found.name}.{name}"
        for found in by_name.values()
        for name in sorted(found.methods & inherited(found))
        if name.startswith("_") and not name.startswith("__")
    ]


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    known, graph = modules(root), imports(root)
    lines = {name: len(path.read_text().splitlines()) for name, path in known.items()}
    print(f"{len(known)} modules, {sum(lines.values())} lines\n\nfiles and lines a folder")
    folders = Counter(str(path.parent.relative_to(root)) for path in known.values())
    for folder, count in sorted(folders.items()):
        own = sum(lines[name] for name, path in known.items() if str(path.parent.relative_to(root)) == folder)
        print(f"  {folder:<28}{count:>4}{own:>7}")
    print("\nlargest files")
    for name, count in Counter(lines).most_common(10):
        print(f"  {name:<44}{count:>5}")
    print("\nlargest classes")
    for found in sorted(classes(root), key=lambda found: -found.lines)[:10]:
        print(f"  {found.module + '.' + found.name:<60}{found.lines:>5} lines, {len(found.methods)} methods")
    overridden = private_overrides(root)
    print(f"\nmethods overridden privately: {len(overridden)}", *overridden, sep="\n  ")
    between = circles(graph)
    print(f"\ncircles of imports between modules: {len(between)}", *map(" <-> ".join, between), sep="\n  ")
    between = circles(rooms(graph, known, root))
    print(f"\ncircles of imports between folders: {len(between)}", *map(" <-> ".join, between), sep="\n  ")


if __name__ == "__main__":
    main()
