"""README and documentation: their Python runs, links lead somewhere, commands exist, tables are current.

A Python block runs after those above it on its page, in an empty folder, with the names of ``prelude``. One after the
comment ``<!-- fragment -->`` is not whole, and only compiled.
"""

import importlib
import os
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "api").glob("*.md")]
}
BLOCK = re.compile(r"^(?P<before>[^\n]*)\n(?:\n)?```(?P<language>[a-z]+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(#[^)\s]+)?\)")
COMMANDS = ("pretrain", "finetune", "memory", "profile", "export", "spectra")
OWN_ARGUMENTS = ("export", "spectra")  # take no configuration
PLACEHOLDERS = {"my.yaml"}  # a file of the reader's


def text_of(page):
    return PAGES[page].read_text(encoding="utf-8")


def blocks(page, language):
    for found in BLOCK.finditer(text_of(page)):
        if found["language"] == language:
            yield found["before"].strip(), found["code"]


def pages_with(language):
    return [page for page in PAGES if any(True for _ in blocks(page, language))]


# ---- Python ---------------------------------------------------------------------------------------------------------


def prelude(folder):
    from transformers import TrainingArguments

    from gracile.models import build_llama

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = torch.tensor(list(Path(__file__).read_bytes()[: 8 * 32])).view(8, 32)
    return {
        "model": build_llama("2m", vocab_size=256, **small),
        "batches": [{"input_ids": part, "labels": part} for part in tokens.chunk(2)],
        "dataset": [{"input_ids": row, "labels": row} for row in tokens],
        "arguments": TrainingArguments(output_dir=str(folder / "trainer"), max_steps=2, report_to="none", use_cpu=True),
        "__name__": "page",
    }


@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = prelude(tmp_path)
    for before, code in blocks(page, "python"):
        compiled = compile(code, page, "exec")
        if before != "<!-- fragment -->":
            exec(compiled, names)


def test_no_block_is_overlooked():
    for page in PAGES:
        counted = len(re.findall(r"^```(?:python|sh|text)$", text_of(page), re.MULTILINE))
        assert counted == sum(len(list(blocks(page, language))) for language in ("python", "sh", "text")), page


# ---- links ----------------------------------------------------------------------------------------------------------


def anchors(path):
    """Of headings, as GitHub makes them."""
    heads = re.findall(r"^#+ +(.+?)\s*$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_repository_lead_somewhere(page):
    path = PAGES[page]
    for target, anchor in LINK.findall(text_of(page)):
        there = (path.parent / target).resolve()
        assert there.exists(), f"{page}: {target} does not exist"
        if anchor and there.suffix == ".md":
            assert anchor[1:] in anchors(there), f"{page}: {target} has no heading {anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    roots = ("benchmarks", "configs", "docs", "examples", "models", "optim", "spectra", "tests", "train")
    for name in re.findall(rf"`((?:{'|'.join(roots)})/[\w./]*)`", text_of(page)):
        assert (ROOT / name).exists(), f"{page}: {name} does not exist"


# ---- commands -------------------------------------------------------------------------------------------------------


def command_lines():
    for page in pages_with("sh"):
        for _, code in blocks(page, "sh"):
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield pytest.param(words, id=f"{page}: {' '.join(words)[:60]}")


@pytest.fixture(scope="module")
def helps():
    """What each command's ``--help`` says, once."""
    from gracile.train import cli

    told = {}

    def help_of(command, capture):
        if command not in told:
            flag = "--help-all" if command in ("pretrain", "finetune") else "--help"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["gracile", command, flag])
                with suppress(SystemExit):
                    cli.main()
            told[command] = capture.readouterr().out
        return told[command]

    return help_of


@pytest.mark.parametrize("words", list(command_lines()))
def test_a_command_of_a_page_can_be_given(words, helps, capsys):
    program = os.path.basename(words[0])
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
        return
    if program in ("pip", "python", ".venv/bin/python"):
        assert program == "pip" or (ROOT / words[1]).exists() or words[1] == "-m"
        return
    if program in ("deepspeed", "torchrun"):
        script = next((word for word in words if word.endswith(".py")), None)
        if script is not None:
            assert (ROOT / script).exists()
            return
        number = next(i for i, word in enumerate(words) if word.startswith("gracile.train."))
        importlib.import_module(words[number])
        words = ["gracile", words[number].rsplit(".", 1)[1], *words[number + 1 :]]
    assert os.path.basename(words[0]) == "gracile", f"{words[0]} is no program that this test knows"
    _, command, *arguments = words
    assert command in COMMANDS
    known = helps(command, capsys) + ("" if command in OWN_ARGUMENTS else helps("pretrain", capsys))
    for i, word in enumerate(arguments):
        if word.startswith("--") and word not in ("--help", "--help-all"):
            assert re.search(rf"{re.escape(word)}\b", known), f"{command} has no {word}"
        if i and arguments[i - 1] in ("--optimizer", "--compare"):
            for name in word.split(","):
                assert re.search(rf"\b{name}\b", known), f"{name} is no optimizer"
        if i and arguments[i - 1] == "--deepspeed":
            assert (ROOT / word).is_file()
    if command not in OWN_ARGUMENTS and arguments and not arguments[0].startswith("-"):
        name = arguments[0]
        assert name in PLACEHOLDERS or (ROOT / "configs" / f"{name}.yaml").is_file(), f"no recipe {name}"


# ---- tables and lists from the code ---------------------------------------------------------------------------------


def generated_table(kind):
    sys.path.insert(0, str(ROOT / "docs" / "_ext"))
    try:
        return importlib.import_module("registry_tables").table(kind)
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize(
    ("page", "kind"),
    [("README.md", "optimizers"), ("docs/layers.md", "layers"), ("docs/pretraining.md", "recipes")],
)
def test_the_tables_of_pages_are_the_registrys(page, kind):
    """``python docs/_ext/registry_tables.py README.md docs/layers.md docs/pretraining.md`` writes them."""
    between = re.search(rf"<!-- {kind}: begin -->\n(.*?)\n<!-- {kind}: end -->", text_of(page), re.DOTALL)
    assert between[1] == generated_table(kind)


def test_the_tables_name_every_optimizer_and_every_recipe():
    from gracile import optim

    classes = {
        name
        for name in optim.__all__
        if isinstance(getattr(optim, name), type) and issubclass(getattr(optim, name), torch.optim.Optimizer)
    }
    named = set(re.findall(r"`(\w+)`", generated_table("optimizers")))
    assert classes <= named
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert recipes <= set(re.findall(r"`(\w+)`", generated_table("recipes")))


def test_the_api_pages_have_every_public_name():
    from gracile import optim
    from gracile.models import layers

    written = "\n".join(text_of(page) for page in PAGES if page.startswith("docs/api/"))
    for module in (optim, layers):
        for name in module.__all__:
            assert re.search(rf"\.\. auto\w+:: {module.__name__}\.{name}$", written, re.MULTILINE), name


def test_the_readme_gives_the_test_command_and_is_a_page():
    readme = text_of("README.md")
    assert "\nmake test\n" in readme
    assert len(readme.splitlines()) <= 125
