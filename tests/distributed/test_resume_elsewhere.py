"""``gracile pretrain`` goes on from a checkpoint on other processes, in another stage, or after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pool import free_port
from safetensors.torch import load_file

from gracile.train.engines.layout import Layout, needs_resharding
from gracile.train.errors import BadInput
from gracile.train.pretrain import main
from gracile.train.run.checkpoints import newest_whole

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


def options(ranks: int, stage: str | None) -> list[str]:
    """The same eight examples a step, on one process or two."""
    flags = ["--gradient_accumulation_steps", str(2 // ranks)]
    return flags + (["--deepspeed", str(CONFIGS / f"{stage}.json")] if stage else [])


@pytest.fixture
def start(tiny, tmp_path):
    """The settings of a run from a saved model: ZeRO 3 draws the weights of a new one in another order."""
    folder = str(tmp_path / "start")
    assert main([tiny(max_steps=1, output_dir=folder)]) == 0
    return tiny(max_steps=12, model=folder, model_overrides=None)


def stopped_after(run: Path, step: int) -> None:
    """Leave what a run that was killed after this step leaves."""
    for path in run.iterdir():
        if path.name.startswith("checkpoint-") and int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
        elif path.name in ("metrics.json", "model.safetensors", "config.json", "loss.png"):
            path.unlink()


def farthest(one: Path, other: Path) -> float:
    """The largest difference of a weight matrix relative to its norm."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return max((torch.linalg.vector_norm(a[key] - b[key]) / torch.linalg.vector_norm(a[key])).item() for key in a)


def moved(start, before, after, folder, pool):
    """A run to its end, and from its step 5 in another place: its folder, the first one's weights, what was said."""
    run = folder / "run"
    command = ["-m", "gracile.train.pretrain", start, "--output_dir", str(run)]
    done = pool.run(before[0], *command, *options(*before))
    assert done.returncode == 0, done.stdout[-3000:]
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    shutil.copy(run / "model.safetensors", undisturbed)
    stopped_after(run, 5)
    again = pool.run(after[0], *command, *options(*after), "--resume_from_checkpoint", "true")
    assert again.returncode == 0, again.stdout[-3000:]
    return run, undisturbed, again


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "zero3"), (1, None)),
        ((2, "zero3"), (2, "zero2")),
        pytest.param((1, None), (2, "zero3"), marks=pytest.mark.thorough),
        pytest.param((2, "zero1"), (1, "zero3"), marks=pytest.mark.thorough),
    ],
    ids=lambda place: f"{place[0]} {place[1] or 'plain'}",
)
def test_a_run_goes_on_elsewhere_as_if_it_had_never_stopped(before, after, start, tmp_path, pool):
    run, undisturbed, again = moved(start, before, after, tmp_path, pool)
    assert again.stdout.count("its state is split anew") == 1
    assert "can make it the same run" not in again.stdout
    assert farthest(undisturbed, run) <= 1e-5
    assert json.loads((run / "metrics.json").read_text())["steps"] == 12


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", ["galore_adamw_8bit", "sltrain_adamw_8bit"])
@pytest.mark.parametrize(
    ("before", "after"), [((2, None), (2, "zero2")), ((2, "zero2"), (1, None))], ids=["to ZeRO 2", "to one process"]
)
def test_moments_in_8_bits_move_within_their_rounding(before, after, optimizer, tiny, tmp_path, pool):
    """Blocks of 8-bit numbers lie otherwise in the parts of ZeRO than in whole matrices, and are rounded once more.
    Seen: 1.7e-3 and 1.9e-3 of a weight matrix, seven steps after the move; with scales of moments lost it is 0.19."""
    layer = {"layer": "sltrain"} if optimizer.startswith("sltrain") else {}
    run, undisturbed, again = moved(tiny(optimizer=optimizer, **layer), before, after, tmp_path, pool)
    assert again.stdout.count("moments in 8 bits are rounded once more") == 1
    assert farthest(undisturbed, run) <= 4e-3


def test_killed_under_the_launcher_it_goes_on_to_the_same_bits(start, tmp_path, metrics, pool):
    """SIGKILL to the launcher and both processes of ``deepspeed --num_accelerators 2``, after the first checkpoint."""

    def command(output_dir):
        return ["gracile.train.pretrain", start, "--output_dir", str(output_dir), *options(2, "zero3")]

    def launch(output_dir):
        launcher = Path(sys.executable).with_name("deepspeed")
        arguments = [str(launcher), "--num_accelerators", "2", "--master_port", str(free_port()), "--module"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        log = (tmp_path / f"{output_dir.name}.log").open("a")
        return subprocess.Popen(
            arguments + command(output_dir), env=environment, stdout=log, stderr=log, start_new_session=True
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = pool.run(2, "-m", *command(whole))
    assert done.returncode == 0, done.stdout[-3000:]
    process = launch(killed)
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None and newest_whole(killed)[0] is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "it must still be running to be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (killed / "metrics.json").exists()
    done = pool.run(2, "-m", *command(killed), "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stdout[-3000:]
    assert metrics(killed)["history"] == metrics(whole)["history"]
    first, second = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_cannot_be_split_anew_is_refused_by_name(tmp_path):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    here = Layout("plain", 1, {}, 8)
    assert not needs_resharding(checkpoint, here)  # made before layouts were written: the engine's to load
    there = {"engine": "deepspeed", "processes": 2, "settings": {"stage": 3}, "examples_per_step": 8}
    (checkpoint / "layout.json").write_text(json.dumps(there))
    with pytest.raises(BadInput, match=r"made by DeepSpeed ZeRO 3 on 2 processes and has no full_state\.pt"):
        needs_resharding(checkpoint, here)
    (checkpoint / "full_state.pt").touch()
    with pytest.raises(BadInput, match=r"has no model\.safetensors"):
        needs_resharding(checkpoint, here)
    (checkpoint / "model-00001-of-00002.safetensors").touch()
    assert needs_resharding(checkpoint, here)
    assert not needs_resharding(checkpoint, Layout(**there))
    assert not needs_resharding(checkpoint, Layout(**{**there, "examples_per_step": 4}))
    assert needs_resharding(checkpoint, Layout(**{**there, "processes": 4}))


def test_replicas_are_one_layout_on_any_number_of_processes():
    assert Layout("plain", 1, {}, 8).places_state_as(Layout("plain", 4, {}, 8))
    assert not Layout("fsdp", 2, {}, 8).places_state_as(Layout("fsdp", 4, {}, 8))
