"""What the pages take from the code: tables from the registry, and the loop of a paper from a module's docstring.

```{table-of} optimizers
```                             optimizers, layers or recipes

```{paper-loop} gracile.optim.GaLoreAdamW
```                             what the docstring of the module that defines the class says
"""

import inspect
import re
from importlib import import_module

from docutils import nodes
from docutils.statemachine import StringList
from registry_tables import table
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature


class TableOf(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        node = nodes.container()
        lines = table(self.arguments[0]).splitlines()
        self.state.nested_parse(StringList(lines, source=f"{self.arguments[0]} table"), self.content_offset, node)
        return node.children


class PaperLoop(SphinxDirective):
    """The docstring as it stands: indented parts are code, others are text in which only ``code`` means something."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        defining = inspect.getmodule(getattr(import_module(module), name))
        assert defining is not None
        text = inspect.cleandoc(defining.__doc__ or "")
        assert text, f"{defining.__name__} has no docstring"
        return [node for block in re.split(r"\n\s*\n", text) for node in self._block(block)]

    def _block(self, block: str) -> list[nodes.Node]:
        lines = block.splitlines()
        if lines[0].startswith("- "):
            items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
            made = nodes.bullet_list()
            for item in items:
                made += nodes.list_item("", nodes.paragraph("", "", *_inline(" ".join(item.split()))))
            return [made]
        first_code = next((i for i, line in enumerate(lines) if line.startswith("  ")), len(lines))
        found: list[nodes.Node] = []
        if first_code:
            found.append(nodes.paragraph("", "", *_inline(" ".join(line.strip() for line in lines[:first_code]))))
        if first_code < len(lines):
            code = inspect.cleandoc("\n" + "\n".join(lines[first_code:]))
            found.append(nodes.literal_block(code, code, language="text"))
        return found


def _inline(text: str) -> list[nodes.Node]:
    parts = re.split(r"``(.+?)``|(?<![`\w])`([^`]+)`", text)
    made: list[nodes.Node] = []
    for i in range(0, len(parts), 3):
        if parts[i]:
            made += _links(parts[i])
        code = next((part for part in parts[i + 1 : i + 3] if part), None)
        if code:
            made.append(nodes.literal(code, code))
    return made


def _links(text: str) -> list[nodes.Node]:
    made: list[nodes.Node] = []
    for i, part in enumerate(re.split(r"arXiv:(\d{4}\.\d{4,5})", text)):
        if i % 2:
            made.append(nodes.reference("", f"arXiv:{part}", refuri=f"https://arxiv.org/abs/{part}"))
        elif part:
            made.append(nodes.Text(part))
    return made


def literal_docstrings(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with ``code``: what reStructuredText would read into |x|, W* or x_ is escaped."""
    _join_names(lines)
    inside = example = False
    for i, line in enumerate(lines):
        stripped = line.strip()
        example = bool(stripped) and (example or stripped.startswith(">>>"))  # with what it prints, to an empty line
        if inside and stripped and not line.startswith(" "):
            inside = False
        if line.rstrip().endswith("::"):
            inside = True
            continue
        if inside or example or stripped.startswith((":", ".. ")):
            continue
        pieces = re.split(r"(``.+?``|:\w+:`[^`]+`|\*\*.+?\*\*)", line)
        lines[i] = "".join(
            piece if j % 2 else re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", re.sub(r"(?<!\\)([*|])", r"\\\1", piece))
            for j, piece in enumerate(pieces)
        )


def _join_names(lines: list[str]) -> None:
    """Lists of arguments that run over several lines before their colon, which napoleon would cut there."""
    try:
        i = lines.index("Args:") + 1
    except ValueError:
        return
    while i < len(lines) and (not lines[i].strip() or lines[i].startswith(" ")):
        entry = lines[i].startswith("    ") and not lines[i].startswith("     ")
        if entry and ": " not in lines[i] and lines[i].rstrip().endswith(",") and i + 1 < len(lines):
            lines[i : i + 2] = [f"{lines[i].rstrip()} {lines[i + 1].strip()}"]
            continue
        i += 1


def constructor_signature(app, what, name, obj, options, signature, annotation):
    """Layers define ``__new__`` for any arguments; what a reader wants is that of ``__init__``."""
    if what != "class" or obj.__new__ is object.__new__ or not inspect.isfunction(obj.__init__):
        return None
    found = inspect.signature(obj.__init__)
    own = found.replace(parameters=list(found.parameters.values())[1:], return_annotation=found.empty)
    return stringify_signature(own, unqualified_typehints=True), annotation


def setup(app):
    app.add_directive("table-of", TableOf)
    app.add_directive("paper-loop", PaperLoop)
    app.connect("autodoc-process-signature", constructor_signature)
    app.connect("autodoc-process-docstring", literal_docstrings, priority=400)  # before napoleon, at 500
    return {"parallel_read_safe": True}
