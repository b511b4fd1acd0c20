"""No file that a command reads runs code: each is poisoned, one at a time, and the command ends with one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from helpers import interrupt
from poison import Poison, poison

from gracile.models import sparse_export
from gracile.train import cli
from gracile.train.data_only import data_only
from gracile.train.engines.deepspeed import safe_classes
from gracile.train.run import checkpoints
from gracile.train.run.contents import AsksForCode, unreadable

UNREAD = {"training_args.bin"}  # the Trainer writes it, and nothing loads it


@pytest.fixture(scope="module")
def saved(tiny_in, tmp_path_factory):
    """The YAML of a run and its folder, which ends with a sparse model."""
    folder = tmp_path_factory.mktemp("poisoned")
    config = tiny_in(folder, max_steps=4, save_steps=2, save_total_limit=1, optimizer="set_adamw", sparsity=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gracile.train.run.report.plot_losses", lambda folder, *rest: (folder / "loss.png").touch())
        patch.setattr("sys.argv", ["gracile", "pretrain", config])
        assert cli.main() == 0
    return config, folder / "run"


@pytest.fixture
def ends(monkeypatch, capsys, tmp_path):
    """Runs a command, and returns its exit code; that nothing ran and one line was said is asserted."""

    def run(*arguments: str) -> int:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["gracile", *map(str, arguments)])
        monkeypatch.setattr("builtins.input", lambda *rest: pytest.fail("a question on stdin"))
        code = cli.main()
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gracile ")]
        assert not (tmp_path / "mark").exists(), "it ran"
        assert len(said) == (code != 0), said
        return code

    return run


FILES = [
    "config.json", "generation_config.json", "layout.json", "model.safetensors", "optimizer.pt", "rng_state.pth",
    "scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json", "training_args.bin",
]  # fmt: skip


def test_these_are_the_files_of_a_checkpoint(saved):
    found = {p.name for p in (saved[1] / "checkpoint-4").iterdir()} - {checkpoints.MANIFEST}
    assert found == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_manifest_to_match(saved, ends, tmp_path, name):
    config, run = saved
    run = interrupt(run, tmp_path / "run", keep="checkpoint-4")
    checkpoint = run / "checkpoint-4"
    poison(checkpoint / name, tmp_path / "mark")
    checkpoints.seal(checkpoint)
    for where in ("true", checkpoint):
        code = ends("pretrain", config, "--output_dir", run, "--resume_from_checkpoint", where, "--max_steps", "4")
        assert code == (0 if name in UNREAD else 2)


def test_what_says_what_there_is(saved, ends, tmp_path):
    """The manifest, run.yaml, and a configuration."""
    config, run = saved
    for number, name in enumerate((f"checkpoint-4/{checkpoints.MANIFEST}", "run.yaml")):
        folder = interrupt(run, tmp_path / str(number), keep="checkpoint-4")
        poison(folder / name, tmp_path / "mark")
        assert ends("pretrain", config, "--output_dir", folder, "--resume_from_checkpoint", "true") == 2
    poison(tmp_path / "own.yaml", tmp_path / "mark")
    for command in ("pretrain", "memory", "profile"):
        assert ends(command, tmp_path / "own.yaml") == 2
    poison(tmp_path / "engine.json", tmp_path / "mark")
    assert ends("pretrain", config, "--deepspeed", tmp_path / "engine.json", "--output_dir", tmp_path / "new") == 2


MODEL_FILES = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json"]
READ_BY = {
    "pretrain model": set(MODEL_FILES),
    "pretrain teacher": {"config.json", "model.safetensors", "pytorch_model.bin"},
    "pretrain tokenizer": {"tokenizer.json", "tokenizer_config.json"},
    "memory model": {"config.json"},
    "export": set(MODEL_FILES),
}


@pytest.mark.parametrize("way", READ_BY)
def test_a_saved_model(saved, ends, tmp_path, way):
    config, run = saved
    for number, name in enumerate(sorted(READ_BY[way])):
        folder = tmp_path / f"model{number}"
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        if name == "pytorch_model.bin":
            (folder / "model.safetensors").unlink()
        poison(folder / name, tmp_path / "mark")
        if way == "export":
            assert ends("export", folder) == 2
            continue
        command, key = way.split()
        own = {} if key != "model" else {"model_overrides": None}
        given = _with(config, tmp_path, **{key: str(folder)}, **own, optimizer="galore_adamw", output_dir="unset")
        assert ends(command, given, "--output_dir", tmp_path / "new") == 2
        assert not (tmp_path / "new").exists()


def _with(config, folder, **changes) -> str:
    settings = {**yaml.safe_load(Path(config).read_text()), **changes}
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return str(path)


def test_data(saved, ends, tmp_path):
    for suffix in (".json", ".jsonl", ".parquet"):
        poison(tmp_path / f"data{suffix}", tmp_path / "mark")
        given = ("--dataset", tmp_path / f"data{suffix}", "--output_dir", tmp_path / "new")
        assert ends("pretrain", saved[0], *given) == 2


def test_an_exported_model(saved, tmp_path, ends):
    _, run = saved
    assert ends("export", run, "--output_dir", tmp_path / "small", "--validation_blocks", "1") == 0
    for name in ("config.json", "generation_config.json", sparse_export.LAYOUT, sparse_export.WEIGHTS):
        folder = tmp_path / f"with {name}"
        shutil.copytree(tmp_path / "small", folder)
        poison(folder / name, tmp_path / "mark")
        with pytest.raises(Exception):  # noqa: B017 - of whatever kind its reader has
            sparse_export.load(folder)
        assert not (tmp_path / "mark").exists()


# ---- what engines load ----------------------------------------------------------------------------------------------


def test_deepspeeds_own_loading_runs_nothing(tmp_path):
    """It asks for weights_only=False."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    engine, mark = TorchCheckpointEngine(), tmp_path / "mark"
    clean = {"stage": ZeroStageEnum(2), "scaler": LossScaler(1.0), "at": fragment_address(1, 2), "w": torch.ones(3)}
    torch.save(clean, tmp_path / "clean.pt")
    torch.save({**clean, "more": Poison(mark)}, tmp_path / "poisoned.pt")
    with data_only(), torch.serialization.safe_globals(safe_classes()):
        assert engine.load(str(tmp_path / "clean.pt"))["at"] == fragment_address(1, 2)
        with pytest.raises(Exception, match="Weights only load failed"):
            engine.load(str(tmp_path / "poisoned.pt"))
    assert not mark.exists()
    assert unreadable(tmp_path / "clean.pt") is None
    with pytest.raises(AsksForCode, match=r"it asks for \S*open to be run"):
        unreadable(tmp_path / "poisoned.pt")
    engine.load(str(tmp_path / "poisoned.pt"))
    assert mark.exists(), "without, it does run"


def test_torchs_variables_are_as_before(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with data_only():
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_the_plan_of_a_sharded_checkpoint(tmp_path):
    """torch.distributed.checkpoint reads it with pickle."""
    held = {"w": torch.ones(4, dtype=torch.bfloat16), "i": torch.arange(3), "groups": [{"lr": 0.1}]}
    dcp.save(held, checkpoint_id=tmp_path / "sharded", no_dist=True)
    plan = tmp_path / "sharded" / ".metadata"
    assert unreadable(plan) is None
    poison(plan, tmp_path / "mark")
    with pytest.raises(AsksForCode, match="open to be run"):
        unreadable(plan)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", [n for n in FILES if n not in UNREAD])
@pytest.mark.parametrize("kind", ["random", "zeros", "empty json"])
def test_a_file_that_cannot_be_read_is_named_also_without_checksums(saved, tmp_path, name, kind):
    shutil.copytree(saved[1] / "checkpoint-4", tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-4" / name
    size = file.stat().st_size
    if kind == "empty json" and file.suffix == ".json":
        pytest.skip("it is JSON")
    random = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = {"random": bytes(random.tolist()), "zeros": bytes(size), "empty json": b"{}" + b" " * (size - 2)}
    file.write_bytes(data[kind])
    sizes = {p.name: p.stat().st_size for p in file.parent.iterdir() if p.name != checkpoints.MANIFEST}
    (file.parent / checkpoints.MANIFEST).write_text(json.dumps(sizes))
    assert checkpoints.fault(file.parent).startswith(f"{name} cannot be read: ")
