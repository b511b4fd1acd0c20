"""``gracile pretrain`` with masks under DeepSpeed's engine: the masks of one process, stopped and gone on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gracile.train.pretrain import main

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
MASKED = {"update_every": 3, "sparsity": 0.8, "t_end": 11, "max_steps": 12, "model_overrides": None}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("zero3", "rigl_adamw"), pytest.param("zero2", "srigl_adamw", marks=pytest.mark.thorough)],
)
def test_two_processes_have_the_masks_of_one(name, optimizer, tiny, tmp_path, pool):
    """And stopped between two changes of the masks they go on to the same bits; so does, nearly, one process."""
    start = str(tmp_path / "start")
    assert main([tiny(max_steps=1, output_dir=start)]) == 0
    config = tiny(model=start, optimizer=optimizer, **MASKED)
    assert main([config]) == 0
    two = tmp_path / "two"
    command = ["-m", "gracile.train.pretrain", config, "--gradient_accumulation_steps", "1", "--output_dir", str(two)]
    done = pool.run(2, *command, "--deepspeed", str(CONFIGS / f"{name}.json"))
    assert done.returncode == 0, done.stdout[-3000:]
    whole, split = load_file(tmp_path / "run" / "model.safetensors"), load_file(two / "model.safetensors")
    sparse = [key for key in whole if "proj" in key]
    assert sparse
    assert all(0.7 < (whole[key] == 0).float().mean() < 0.9 for key in sparse)
    for key, value in whole.items():
        assert torch.equal(value == 0, split[key] == 0), key
        assert torch.linalg.vector_norm(value - split[key]) <= 1e-4 * torch.linalg.vector_norm(value), key

    again = pool.run(2, *command, "--deepspeed", str(CONFIGS / f"{name}.json"), *resumed(two))
    assert again.returncode == 0, again.stdout[-3000:]
    assert all(torch.equal(split[key], value) for key, value in load_file(two / "model.safetensors").items())

    assert main([config, "--output_dir", str(two), *resumed(two)]) == 0  # of two processes, split anew for one
    for key, value in load_file(two / "model.safetensors").items():
        assert torch.equal(value == 0, split[key] == 0), key
        assert torch.linalg.vector_norm(value - split[key]) <= 1e-4 * torch.linalg.vector_norm(value), key


def resumed(folder):
    return "--resume_from_checkpoint", str(folder / "checkpoint-5")
