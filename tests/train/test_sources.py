"""A path is a path: what does not exist here is refused at once, and only what says so is asked from the hub."""

import json
from pathlib import Path

import pytest
import transformers
import yaml

from gracile.registry import recipes
from gracile.train import cli, sources
from gracile.train.errors import BadInput
from gracile.train.sources import OF_RECIPES, source_of

CONFIGS = Path(sources.__file__).parents[1] / "configs"


@pytest.fixture
def no_hub(monkeypatch):
    """Whoever asks a hub fails the test."""

    def asked(*arguments, **keywords):
        raise AssertionError(f"a hub was asked: {arguments}")

    monkeypatch.setattr("socket.socket.connect", asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for kind in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", asked)


@pytest.mark.parametrize("command", ["pretrain", "memory", "profile"])
@pytest.mark.parametrize(
    ("key", "value", "way"),
    [
        ("model", "runs/quickstart", "run `gracile pretrain quickstart` first"),
        ("model", "nosuchdir/sub", "hub:nosuchdir/sub"),
        ("model", "runs/2026/tuesday", "give a path that does"),
        ("teacher", "runs/quickstart", "run `gracile pretrain quickstart` first"),
        ("tokenizer", "nosuchdir/sub", "hub:nosuchdir/sub"),
        ("tokenizer", "bert-base-uncased", "hub:bert-base-uncased"),
        ("dataset", "nosuchdir/sub", "hub:nosuchdir/sub"),
        ("dataset", "data", "hub:data"),
    ],
)
def test_a_path_that_does_not_exist_is_refused_at_once(
    tiny, tmp_path, monkeypatch, capsys, no_hub, command, key, value, way
):
    if (command == "memory" and key != "model") or (command == "profile" and key == "teacher"):
        pytest.skip("the command does not read it")
    monkeypatch.chdir(tmp_path)
    overrides = {"model_overrides": None} if key == "model" else {}
    output = ["--output_dir", "out"] if command != "profile" else []
    config = tiny(**{key: value}, **overrides, output_dir=None)
    monkeypatch.setattr("sys.argv", ["gracile", command, config, *output])
    assert cli.main() == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1, err
    assert f"{key} {value!r} does not exist" in err[0]
    assert way in err[0]
    assert not (tmp_path / "out").exists()


def test_what_the_recipes_name_is_the_hubs_or_another_recipes():
    """They keep working as they are."""
    hub = set()
    for name in recipes():
        settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        for key in ("dataset", "tokenizer"):
            if settings.get(key) not in (None, "stdlib", "stdlib-docstrings"):
                assert source_of(key, settings[key]).on_hub
                hub |= set() if settings[key].startswith(sources.MARK) else {settings[key]}
        for key in ("model", "teacher"):
            if settings.get(key, "").startswith(sources.MARK):
                assert source_of(key, settings[key]).on_hub
            elif "/" in settings.get(key, ""):
                assert settings[key].split("/") == ["runs", Path(settings[key]).name]
                assert Path(settings[key]).name in recipes()
    assert hub == set(OF_RECIPES)


def test_what_is_here_comes_before_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("allenai/c4").mkdir(parents=True)
    assert not source_of("dataset", "allenai/c4").on_hub
    assert source_of("dataset", "hub:allenai/c4") == sources.Source("allenai/c4", on_hub=True)
    assert source_of("dataset", "hub:wikitext").on_hub


@pytest.mark.parametrize("name", ["hub:", "hub:/etc", "hub:../x", "hub:a/b/c"])
def test_what_no_name_on_the_hub_can_be_is_refused(name):
    with pytest.raises(BadInput, match="is no name on the hub"):
        source_of("model", name)


def test_the_hub_is_asked_for_what_names_it(tiny, monkeypatch, capsys):
    from gracile.train.pretrain import main

    asked = []

    def opened(name, *arguments, **keywords):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", opened)
    for name in ("hub:some/thing", "allenai/c4"):
        assert main([tiny(dataset=name, dataset_config="en")]) == 2
        assert "could not be opened on the hub: no network" in capsys.readouterr().err
    assert main([tiny(validation_dataset="hub:some/held_out.txt")]) == 2  # an ending makes it no path
    assert "'hub:some/held_out.txt'" in capsys.readouterr().err
    assert asked == ["some/thing", "allenai/c4", "some/held_out.txt"]


@pytest.mark.parametrize("given", [{"dataset": ["stdlib", "some/thing"]}, {"validation_dataset": "some/thing"}])
def test_each_of_several_data_sets_is_a_path_unless_it_says_hub(tiny, capsys, no_hub, given):
    from gracile.train.pretrain import main

    assert main([tiny(**given)]) == 2
    assert "'some/thing' does not exist; give a path that does, or, for the hub's, say hub:" in capsys.readouterr().err


# ---- code that a model brings along ---------------------------------------------------------------------------------


@pytest.fixture
def with_code(tmp_path):
    """A saved model whose configuration is Python code, which leaves a mark when it runs."""
    folder, mark = tmp_path / "theirs", tmp_path / "it ran"
    folder.mkdir()
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig\n\n\nclass Theirs(LlamaConfig):\n"
    (folder / "theirs.py").write_text(code + "    model_type = 'theirs'\n")
    auto = {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"}
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": auto, "vocab_size": 400}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}))
    return folder, mark


@pytest.mark.parametrize(
    ("command", "key"),
    [("pretrain", "model"), ("memory", "model"), ("profile", "model"), ("pretrain", "teacher"),
     ("pretrain", "tokenizer"), ("export", None)],
)  # fmt: skip
def test_code_of_a_model_is_never_run_nor_asked_about(tiny, with_code, tmp_path, monkeypatch, capsys, command, key):
    folder, mark = with_code

    def asked(*arguments):
        raise AssertionError("a question on stdin")

    monkeypatch.setattr("builtins.input", asked)
    if command == "export":
        arguments = [str(folder), "--dataset", "stdlib"]
    else:
        overrides = {"model_overrides": None} if key == "model" else {}
        arguments = [tiny(**{key: str(folder)}, **overrides)]
    monkeypatch.setattr("sys.argv", ["gracile", command, *arguments])
    assert cli.main() == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in err if line.startswith("gracile ")]) == 1, err
    assert "code of its own, which is not run" in err[-1]
    assert ("--trust_remote_code true" in err[-1]) == (command != "export")
    assert not mark.exists()
    assert not (tmp_path / "run").exists()
