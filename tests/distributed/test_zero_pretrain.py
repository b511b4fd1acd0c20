"""``gracile pretrain`` under DeepSpeed's engine: the run of one process, and one that is stopped and goes on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gracile.train.pretrain import main

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


@pytest.mark.parametrize("name", [pytest.param("zero2", marks=pytest.mark.thorough), "zero3"])
def test_two_processes_train_the_run_of_one(name, tiny, tmp_path, metrics, pool, monkeypatch):
    """And stopped after a checkpoint, they go on to the same bits; the saved model is whole. Nothing is compiled. At
    the end there is nothing left to train.

    From a saved model: ZeRO 3 draws the weights of a new one in another order.
    """
    compiled = tmp_path / "compiled"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(compiled))
    start = str(tmp_path / "start")
    assert main([tiny(max_steps=1, output_dir=start)]) == 0
    config = tiny(max_steps=12, model=start, model_overrides=None)
    assert main([config]) == 0
    two = tmp_path / "two"
    command = ["-m", "gracile.train.pretrain", config, "--gradient_accumulation_steps", "1", "--output_dir", str(two)]
    command += ["--deepspeed", str(CONFIGS / f"{name}.json")]
    done = pool.run(2, *command)
    assert done.returncode == 0, done.stdout[-3000:]
    assert not compiled.exists()
    one, other = metrics(tmp_path / "run"), metrics(two)
    assert (other["tokens"], other["parameters"]) == (one["tokens"], one["parameters"])
    assert other["adamw_state_bytes"] == one["adamw_state_bytes"] // 2
    assert other["gradient_bytes"] == one["gradient_bytes"] // 2
    assert 0.5 <= other["optimizer_state_bytes"] / one["optimizer_state_bytes"] <= 0.53
    whole, split = load_file(tmp_path / "run" / "model.safetensors"), load_file(two / "model.safetensors")
    for key, value in whole.items():
        assert torch.linalg.vector_norm(value - split[key]) <= 1e-4 * torch.linalg.vector_norm(value), key

    again = pool.run(2, *command, "--resume_from_checkpoint", str(two / "checkpoint-5"))
    assert again.returncode == 0, again.stdout[-3000:]
    resumed = load_file(two / "model.safetensors")
    assert all(torch.equal(split[key], value) for key, value in resumed.items())
    assert json.loads((two / "metrics.json").read_text())["history"] == other["history"]

    finished = pool.run(2, *command, "--resume_from_checkpoint", "true")
    assert finished.returncode == 0, finished.stdout[-3000:]
    for key in ("history", "validation_loss", "optimizer_state_bytes", "weight_bytes"):
        assert metrics(two)[key] == other[key], key
    resumed = load_file(two / "model.safetensors")
    assert all(torch.equal(split[key], value) for key, value in resumed.items())
