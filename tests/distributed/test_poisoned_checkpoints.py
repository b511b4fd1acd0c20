"""No file of an engine's checkpoint runs code where a run is resumed, and two launches never share a folder."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import interrupt
from poison import poison

from gracile.train.run import checkpoints
from gracile.train.run.lock import LOCK

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
UNREAD = ("training_args.bin", "zero_to_fp32.py", "zero_to_torch.py")  # scripts for people; nothing here runs them


def lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("gracile pretrain:")]


@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=pytest.mark.thorough) for name in ("plain", "zero1", "zero2", "zero3")]
)
def test_each_file_of_a_checkpoint_poisoned(stage, tiny, tmp_path, pool):
    """One after the other, with a manifest to match; clean, it goes on."""
    engine = [] if stage == "plain" else ["--deepspeed", str(CONFIGS / f"{stage}.json")]
    command = ["-m", "gracile.train.pretrain", tiny(max_steps=2, save_steps=1), *engine]
    done = pool.run(2, *command)
    assert done.returncode == 0, done.stdout[-3000:]
    first = interrupt(tmp_path / "run", tmp_path / "again", keep="checkpoint-1")
    command += ["--output_dir", str(first), "--resume_from_checkpoint", "true"]
    clean = tmp_path / "clean"
    shutil.copytree(first, clean)
    files = [p.relative_to(first) for p in sorted(first.rglob("*")) if p.is_file() and p.name not in UNREAD]
    files = [p for p in files if p.parts[0] in ("checkpoint-1", "run.yaml")]
    assert len(files) >= 12
    for file in files:
        poison(first / file, tmp_path / "mark")
        if file.name not in (checkpoints.MANIFEST, "run.yaml"):
            checkpoints.seal(first / "checkpoint-1")
        done = pool.run(2, *command)
        assert not (tmp_path / "mark").exists(), file
        assert done.returncode == 2, (file, done.stdout[-3000:])
        assert len(lines(done.stdout)) == 1, (file, done.stdout[-3000:])
        shutil.rmtree(first)
        shutil.copytree(clean, first)
    done = pool.run(2, *command)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_second_launch_in_the_same_folder_is_refused_and_the_first_goes_on(tiny, tmp_path, pool):
    command = ["-m", "gracile.train.pretrain", tiny(max_steps=400, save_steps=1000)]
    first = pool.start(2, *command)
    try:
        while not (tmp_path / "run" / "run.yaml").exists():
            assert not first.ended(), first.output()[-3000:]
        second = pool.run(2, *command, "--resume_from_checkpoint", "true")
        assert second.returncode == 2
        said = lines(second.stdout)
        assert len(said) == 1, second.stdout[-3000:]
        assert "is in use by process" in said[0]
        assert (tmp_path / "run" / LOCK).exists()
        assert not first.ended(), "it must still be running"
    finally:
        first.kill()
    again = pool.run(2, *command, "--resume_from_checkpoint", "true", "--max_steps", "2")
    assert again.returncode == 0, again.stdout[-3000:]
    assert "was left locked by process" in again.stdout
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_file_that_one_process_cannot_load_is_named_by_that_process(tiny, tmp_path, pool):
    """Its neighbour only sees that it has gone."""
    command = ["-m", "gracile.train.pretrain", tiny(max_steps=2, save_steps=1)]
    assert pool.run(2, *command).returncode == 0
    checkpoint = interrupt(tmp_path / "run", tmp_path / "again", keep="checkpoint-1") / "checkpoint-1"
    torch.save({"python": 1}, checkpoint / "rng_state_1.pth")
    checkpoints.seal(checkpoint)
    job = pool.start(2, *command, "--output_dir", str(checkpoint.parent), "--resume_from_checkpoint", "true")
    job.wait()
    assert job.codes == {0: 1, 1: 2}, job.output()[-3000:]
    said = lines(job.output())
    assert len(said) == 2, said
    assert sum(f"{str(checkpoint)!r} cannot be loaded: " in line for line in said) == 1, said
    assert sum("another process of the run has ended" in line for line in said) == 1, said
