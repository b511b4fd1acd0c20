"""Kill a training run with SIGKILL again and again, resume it each time, and compare it with an undisturbed one.

    python tests/train/kill_and_resume.py --kills 10

Some kills come while the run starts, some at any moment, and every second one waits for a checkpoint that is being
written and strikes there. Passes when every resumption works and the final losses and weights are bit for bit the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file


def write_config(folder: Path, steps: int) -> Path:
    source = Path(util.find_spec("argparse").origin)
    (folder / "corpus.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    config = {
        "model": "2m",
        "model_overrides": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 600},
        "dataset": str(folder / "corpus.txt"),
        "block_size": 64,
        "rank": 8,
        "update_proj_gap": 20,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 8,
        "max_steps": steps,
        "save_steps": 5,
        "save_total_limit": 2,
        "logging_steps": 5,
        "output_dir": "unset",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def launch(config: Path, output_dir: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "gracile.train.pretrain", str(config), "--output_dir", str(output_dir)]
    if (output_dir / "run.yaml").exists():
        command += ["--resume_from_checkpoint", "true"]
    with open(log, "a") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )


def half_written(output_dir: Path) -> bool:
    return any(not (p / "complete.json").exists() for p in output_dir.glob("checkpoint-*"))


def newest_step(output_dir: Path) -> int:
    return max((int(p.name.split("-")[1]) for p in output_dir.glob("checkpoint-*")), default=0)


def finish(process: subprocess.Popen) -> None:
    if process.wait() != 0:
        sys.exit(f"FAILED: the run ended with exit code {process.returncode}")


def strike(process: subprocess.Popen, until: Callable[[], bool], delay: float) -> None:
    """Kill the process ``delay`` seconds after ``until`` first holds."""
    while not until():
        if process.poll() is not None:
            sys.exit(f"FAILED: the run ended with exit code {process.returncode} before it could be killed")
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=None, help="length of the run; by default 40 for each kill")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps = options.steps or 40 * options.kills
    moments = random.Random(options.seed)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(folder, steps)
        whole, broken, log = folder / "whole", folder / "broken", folder / "log.txt"
        finish(launch(config, whole, log))
        print(f"undisturbed: {steps} steps", flush=True)

        for kill in range(1, options.kills + 1):
            process = launch(config, broken, log)
            goal = newest_step(broken) + moments.choice((5, 10, 15))
            if kill % 5 == 1:  # while it starts
                strike(process, lambda: True, moments.uniform(0, 8))
            elif kill % 2:  # at any moment
                strike(process, lambda goal=goal: newest_step(broken) >= goal, moments.uniform(0, 0.5))
            else:  # in the middle of a save
                strike(process, lambda goal=goal: newest_step(broken) >= goal and half_written(broken), 0)
            where = "while a checkpoint was written" if half_written(broken) else "between checkpoints"
            print(f"kill {kill}: {where}, newest folder at step {newest_step(broken)}", flush=True)
        finish(launch(config, broken, log))

        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("skipping"):
                print(line.replace(str(folder), "..."))
        one, other = (json.loads((run / "metrics.json").read_text()) for run in (whole, broken))
        if one["history"] != other["history"] or one["validation_loss"] != other["validation_loss"]:
            sys.exit("FAILED: the losses differ")
        a, b = (load_file(run / "model.safetensors") for run in (whole, broken))
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            sys.exit("FAILED: the weights differ")
        loss = other["validation_loss"]
        print(
            f"passed: {options.kills} kills; validation loss {loss!r}, every logged loss and every weight are the same"
        )


if __name__ == "__main__":
    main()
