"""The registry holds every optimizer and layer of the package, and says of each where it comes from."""

import inspect
import re
import subprocess
import sys
from importlib import resources

import pytest
import torch

from gracile import optim, registry
from gracile.models import layers
from gracile.registry import LAYERS, OPTIMIZERS, recipes
from gracile.train.listing import main as listing

# Bases, and what inference computes with: no run is configured with them.
NOT_TRAINED = {layers.FactoredLinear, layers.IsoFlopLinear}


def classes(module, base):
    found = {getattr(module, name) for name in module.__all__}
    return {cls for cls in found if inspect.isclass(cls) and issubclass(cls, base)}


def test_every_optimizer_has_an_entry():
    public = classes(optim, torch.optim.Optimizer)
    assert {entry.cls for entry in OPTIMIZERS.values()} == public | {torch.optim.AdamW}
    assert len(OPTIMIZERS) == len(public) + 1, "one each"


def test_every_layer_that_is_trained_has_an_entry():
    inference = classes(layers, layers.InferenceLinear)
    assert {entry.cls for entry in LAYERS.values()} == classes(layers, torch.nn.Module) - NOT_TRAINED - inference


@pytest.mark.parametrize("entry", [*OPTIMIZERS.values(), *LAYERS.values()], ids=lambda entry: entry.name)
def test_an_entry_says_what_it_is_and_where_it_comes_from(entry):
    assert entry.summary.endswith(".")
    assert "\n" not in entry.summary
    assert len(entry.summary) <= 90
    assert entry.paper
    assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv)


@pytest.mark.parametrize("entry", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_fits_what_it_names(entry):
    assert entry.layer is None or entry.layer in LAYERS
    assert entry.clocks.keys() <= entry.accepts()
    assert entry.family == "plain" or entry.accepts() & {"rank", "sparsity", "keep", "n"} or entry.layer
    assert ("rank" in entry.accepts()) == (entry.family == "low_rank")
    assert not entry.trains_masks or "sparsity" in entry.accepts()


def test_layers_know_their_optimizers():
    assert LAYERS["sltrain"].optimizers == ()
    assert LAYERS["sst"].optimizers == ("sst_adamw",)
    masked = ("sparse_adamw", "set_adamw", "rigl_adamw", "srigl_adamw", "block_sparse_adamw")
    assert LAYERS["doped"].optimizers == masked


@pytest.mark.parametrize("entry", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_file_of_a_class_names_its_paper(entry):
    text = inspect.getsource(inspect.getmodule(entry.cls))
    assert entry.arxiv in text or "arXiv:" not in text or entry.arxiv == registry.SET[1], "which is a journal's there"


def test_every_embedded_configuration_has_a_summary():
    names = {p.name.removesuffix(".yaml") for p in resources.files("gracile.configs").iterdir()}
    assert recipes().keys() == {name for name in names if f"{name}.yaml" in _files()}
    for entry in recipes().values():
        assert entry.summary.endswith(".") or "\n" not in entry.summary
        assert not entry.summary.endswith("al.")
        assert len(entry.summary) > 20


def _files():
    return {p.name for p in resources.files("gracile.configs").iterdir() if p.name.endswith(".yaml")}


def test_tables_are_markdown_with_a_row_each():
    tables = {
        registry.optimizer_table(): OPTIMIZERS,
        registry.layer_table(): LAYERS,
        registry.recipe_table(): recipes(),
    }
    for text, entries in tables.items():
        head, rule, *rows = text.splitlines()
        assert set(rule) == {"|", "-", " "}
        assert len({line.count(" | ") for line in (head, rule, *rows)}) == 1
        assert [row.split("`")[1] for row in rows] == list(entries)


def test_the_list_names_everything(capsys):
    assert listing([]) == 0
    out = capsys.readouterr().out
    for name in (*OPTIMIZERS, *LAYERS, *recipes()):
        assert f"  {name}" in out
    assert max(map(len, out.splitlines())) <= 110
    assert listing(["layers"]) == 0
    assert "galore_adamw" not in capsys.readouterr().out


def test_what_cannot_be_listed_gets_one_line(capsys):
    assert listing(["layer"]) == 2
    assert capsys.readouterr().err == "gracile list: there are no 'layer' to list; did you mean 'layers'?\n"


def test_the_registry_imports_nothing_heavy():
    heavy = ("transformers", "datasets", "matplotlib", "deepspeed", "bitsandbytes", "accelerate")
    code = f"import sys, gracile.train.listing; print(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == ""
