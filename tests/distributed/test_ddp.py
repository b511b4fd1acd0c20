"""DistributedDataParallel through torchrun: the same run as one process with the same global batch."""

import pytest
import torch
from safetensors.torch import load_file

from gracile.train.pretrain import main


def test_two_ranks_train_the_run_of_one(tiny, tmp_path, metrics, torchrun, pool):
    config = tiny(max_steps=12)
    assert main([config]) == 0
    two = tmp_path / "two"
    result = torchrun(
        2, "-m", "gracile.train.pretrain", config, "--gradient_accumulation_steps", "1", "--output_dir", str(two)
    )
    assert result.returncode == 0, result.stdout[-3000:]
    one, other = metrics(tmp_path / "run"), metrics(two)
    assert other["tokens"] == one["tokens"]
    assert (two / "loss.png").stat().st_size > 0
    losses = [[entry["loss"] for entry in told["history"] if "loss" in entry] for told in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, a), b in zip(
        load_file(tmp_path / "run" / "model.safetensors").items(),
        load_file(two / "model.safetensors").values(),
        strict=True,
    ):
        assert torch.linalg.vector_norm(a - b) <= 1e-4 * torch.linalg.vector_norm(a), name

    resumed = pool.run(
        2, "-m", "gracile.train.pretrain", config, "--gradient_accumulation_steps", "1", "--output_dir", str(two),
        "--resume_from_checkpoint", str(two / "checkpoint-5"),
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    assert metrics(two)["history"] == other["history"], "bit for bit"


def test_bad_input_is_said_once_for_all_ranks(tiny, tmp_path, pool):
    result = pool.run(2, "-m", "gracile.train.pretrain", tiny(rank=0))
    assert result.returncode != 0
    assert result.stdout.count("gracile pretrain: rank must be at least 1, got 0") == 1
    assert not (tmp_path / "run").exists()
