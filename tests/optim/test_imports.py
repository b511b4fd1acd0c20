"""Imports point strictly downward: train -> {models, optim} -> torch. And ``gracile.optim`` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("transformers", "datasets", "deepspeed", "bitsandbytes", "accelerate", "tokenizers", "huggingface_hub")


def modules_of(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no Python files under {ROOT / folder}"
    return [str(path.relative_to(ROOT)) for path in files]


def imported_by(path, source):
    """Absolute names of all that a file of the package imports, inside functions too; ``from a import b`` as a.b."""
    package = ("gracile", *Path(path).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, *(node.module or "").split(".")]
            yield from (".".join(part for part in [*base, alias.name] if part) for alias in node.names)


def lies_in(name, *parts):
    """Whether a dotted name is one of ``parts`` or below it."""
    return any(name == part or name.startswith(part + ".") for part in parts)


def offences(path, source):
    """Imports that the layers forbid in a file."""
    names = list(imported_by(path, source))
    if Path(path).parts[0] == "models":
        return [name for name in names if lies_in(name, "gracile.optim", "gracile.train")]
    own = [
        "gracile.optim",
        *(f"gracile.{path.stem}" for path in ROOT.glob("[a-z]*.py") if path.stem != "registry"),
        "torch",
    ]
    if path == "optim/state/blockwise_8bit.py":
        own.append("bitsandbytes")  # behind this one file
    return [name for name in names if not lies_in(name, *own) and name.split(".")[0] not in sys.stdlib_module_names]


@pytest.mark.parametrize("path", modules_of("optim"))
def test_optim_imports_only_the_standard_library_torch_and_itself(path):
    assert offences(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", modules_of("models"))
def test_models_import_nothing_of_optim_or_train(path):
    assert offences(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", sorted({path.name for path in ROOT.glob("[a-z]*.py")} - {"registry.py"}))
def test_what_both_use_imports_torch_and_validation_alone(path):
    names = list(imported_by(path, (ROOT / path).read_text()))
    assert names
    for name in names:
        known = lies_in(name, "torch", "gracile.validation") or name.split(".")[0] in sys.stdlib_module_names
        assert known, name


@pytest.mark.parametrize(
    ("path", "line", "name"),
    [
        ("optim/new.py", "from ..models import build_llama", "gracile.models.build_llama"),
        ("optim/distributed/new.py", "from ...train.config import load", "gracile.train.config.load"),
        ("optim/new.py", "from .. import train", "gracile.train"),
        ("optim/new.py", "def f():\n    import transformers.optimization", "transformers.optimization"),
        ("optim/__init__.py", "from gracile.models.llama import SIZES", "gracile.models.llama.SIZES"),
        ("models/layers/new.py", "from ...optim.rules import adam", "gracile.optim.rules.adam"),
        ("models/new.py", "import gracile.train", "gracile.train"),
        ("optim/low_rank/q_galore.py", "import bitsandbytes.functional", "bitsandbytes.functional"),
    ],
)
def test_this_test_sees_an_import_that_points_upward(path, line, name):
    assert offences(path, line) == [name]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("optim/distributed/new.py", "from ...validation import require"),
        ("optim/distributed/new.py", "from ..low_rank import basis"),
        ("optim/new.py", "import torch.distributed, math"),
        ("models/new.py", "from transformers import LlamaConfig"),
    ],
)
def test_this_test_lets_an_import_that_points_downward_pass(path, line):
    assert offences(path, line) == []


def test_importing_the_optimizers_imports_nothing_heavy():
    code = f"import sys, gracile.optim; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == ""
