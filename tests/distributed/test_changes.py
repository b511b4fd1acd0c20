"""Keys that change between a run under ZeRO and its resumption; tests/train/run/test_changes.py has one process."""

import json
from pathlib import Path

import pytest
import torch
from helpers import interrupt, weights

from gracile.train.pretrain import main

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
RESUME = ["--resume_from_checkpoint", "true"]
CHANGED = ["--learning_rate", "0.02", "--max_steps", "16", "--weight_decay", "0.5"]


def lines(output):
    return [line for line in output.splitlines() if line.startswith("gracile pretrain:")]


@pytest.mark.parametrize("name", [pytest.param("zero2", marks=pytest.mark.thorough), "zero3"])
def test_a_run_under_zero_goes_on_with_changed_keys_as_one_process_does(name, tiny, tmp_path, metrics, pool):
    """Rates, length, decay and the size of a batch; what may not change is refused, once, and run.yaml stays."""
    config = tiny(max_steps=8, logging_steps=1, lr_scheduler_type="linear", gradient_accumulation_steps=1)
    engine = ["--deepspeed", str(CONFIGS / f"{name}.json")]
    command = ["-m", "gracile.train.pretrain", config, *engine]
    done = pool.run(2, *command)
    assert done.returncode == 0, done.stdout[-3000:]
    split, alone = (interrupt(tmp_path / "run", tmp_path / way, keep="checkpoint-5") for way in ("split", "alone"))

    before = (split / "run.yaml").read_bytes()
    done = pool.run(2, *command, "--output_dir", str(split), *RESUME, "--seed", "3")
    assert done.returncode == 2
    assert len(lines(done.stdout)) == 1, done.stdout[-3000:]
    assert "seed is 3" in lines(done.stdout)[0]
    assert (split / "run.yaml").read_bytes() == before

    batch = "--per_device_train_batch_size"
    done = pool.run(2, *command, "--output_dir", str(split), *RESUME, *CHANGED, batch, "2")
    assert done.returncode == 0, done.stdout[-3000:]
    for change in ("learning_rate: 0.01 -> 0.02", "max_steps: 8 -> 16", "weight_decay: 0.0 -> 0.5", "size: 4 -> 2"):
        assert done.stdout.count(change) == 1, change
    assert main([config, "--output_dir", str(alone), *RESUME, *CHANGED, batch, "4"]) == 0

    told = {e["step"]: e["learning_rate"] for e in metrics(split)["history"] if "loss" in e}
    expected = {step: 0.02 * (1 - (step - 1) / 16) for step in range(6, 17)}
    assert {step: rate for step, rate in told.items() if step > 5} == pytest.approx(expected, rel=1e-6)
    assert max(told) == 16
    assert json.loads((split / "history.jsonl").read_text().splitlines()[-2])["changes"].keys() >= {"weight_decay"}
    other = weights(alone)
    for key, value in weights(split).items():
        assert torch.linalg.vector_norm(value - other[key]) <= 1e-4 * torch.linalg.vector_norm(value), key


def test_all_processes_know_of_a_change_whichever_looks_first(tiny, tmp_path, pool):
    """Else replicas would go on with different learning rates."""
    config = tiny(max_steps=2, save_steps=1, gradient_accumulation_steps=1)
    assert pool.run(2, "-m", "gracile.train.pretrain", config).returncode == 0
    again = interrupt(tmp_path / "run", tmp_path / "again", keep="checkpoint-1")
    more = ["--output_dir", str(again), *RESUME, "--learning_rate", "0.02"]
    found = pool.call(2, "pool_jobs:changes_seen_late", [config, *more])
    assert found == [[["learning_rate"]], [["learning_rate"]]]
