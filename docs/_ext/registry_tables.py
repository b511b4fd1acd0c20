"""Tables of optimizers, layers and recipes, from the registry: for the pages, and for the README.

python docs/_ext/registry_tables.py README.md docs/layers.md docs/pretraining.md
"""

import re
import sys
from pathlib import Path

from gracile import registry

TABLES = {"optimizers": "optimizer_table", "layers": "layer_table", "recipes": "recipe_table"}


def table(kind: str) -> str:
    """The Markdown table of optimizers, layers or recipes."""
    text: str = getattr(registry, TABLES[kind])()
    return text.strip()


def write(path: Path) -> None:
    """Replace what is between the markers of a page."""
    text = path.read_text(encoding="utf-8")
    for kind in TABLES:
        begin, end = f"<!-- {kind}: begin -->\n", f"<!-- {kind}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = f"{begin}{table(kind)}\n{end}".join(pattern.split(text))
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name))
