"""Every optimizer on one small run at equal tokens: final validation loss and bytes of state, as one table.

    python benchmarks/quickstart.py                           # the quickstart: source text of the standard library
    python benchmarks/quickstart.py --dataset wikitext.txt    # the same run on another text
    python benchmarks/quickstart.py --optimizers adamw fira_adamw --factors 0.5 1 2

Each line is ``gracile pretrain quickstart`` with the settings of ``RUNS``. The learning rates there are tried times
every one of ``--factors``, and the best final validation loss counts: the same budget for every optimizer, AdamW
included. Runs that are in the results file already are not run again. ``--jobs`` runs several at a time, on a GPU or on
many cores; ``TARGETS`` is the share of the learning rate that the lines at two rates give to the matrices (a tenth).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
WRITING = threading.Lock()

# how the weights that a mask grows count their steps
GROWN: dict[str, dict[str, Any]] = {
    "shared steps": {},
    "own steps": {"grown_step": "own"},
    "own steps, warm-up": {"grown_step": "own", "grown_warmup": 10},
}

# name in the table -> settings; a learning rate of each one's usual order of size at this model, and the papers'
# exact singular vectors but for one line, which shows what the default iteration makes of them
RUNS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "learning_rate": 0.002},
    "AdamW, targets at a tenth": {"optimizer": "adamw", "learning_rate": 0.02, "script": "split_adamw.py"},
    "Lion": {"optimizer": "lion", "learning_rate": 0.001},
    "GaLoreAdamW": {"optimizer": "galore_adamw", "learning_rate": 0.02, "subspace_method": "svd"},
    "GaLoreAdamW, iterate": {"optimizer": "galore_adamw", "learning_rate": 0.02, "subspace_method": "iterate"},
    "GaLoreAdamW8bit": {"optimizer": "galore_adamw_8bit", "learning_rate": 0.02, "subspace_method": "svd"},
    "GaLoreAdamW8bit, Q-GaLore": {
        "optimizer": "galore_adamw_8bit",
        "learning_rate": 0.02,
        "subspace_method": "svd",
        "optimizer_args": {"quant": True, "cos_threshold": 0.4},
    },
    "GaLoreAdafactor": {"optimizer": "galore_adafactor", "learning_rate": 0.02, "subspace_method": "svd"},
    "GaLoreLion": {"optimizer": "galore_lion", "learning_rate": 0.004, "subspace_method": "svd"},
    "GaLorePlusAdamW": {
        "optimizer": "galore_plus_adamw",
        "learning_rate": 0.02,
        "optimizer_args": {"residual_warmup": 30},
    },
    "FiraAdamW": {"optimizer": "fira_adamw", "learning_rate": 0.01, "subspace_method": "svd"},
    "GradNormLoRPAdamW": {
        "optimizer": "gradnormlorp_adamw",
        "learning_rate": 0.005,
        "scale": 2,
        "subspace_method": "svd",
    },
    "DCTAdamW": {"optimizer": "dct_adamw", "learning_rate": 0.005, "update_proj_gap": 1},
    "DCTAdamW, 8-bit error feedback": {
        "optimizer": "dct_adamw",
        "learning_rate": 0.005,
        "update_proj_gap": 1,
        "optimizer_args": {"error_feedback": "8bit"},
    },
    "APOLLOAdamW": {"optimizer": "apollo_adamw", "learning_rate": 0.01, "scale": 1},
    "APOLLOAdamW, Mini": {
        "optimizer": "apollo_adamw",
        "learning_rate": 0.01,
        "scale": 128,
        "rank": 1,
        "optimizer_args": {"scale_type": "tensor"},
    },
    "LDAdamW": {
        "optimizer": "ldadamw",
        "learning_rate": 0.005,
        "adam_beta1": 0.908,
        "adam_beta2": 0.99,
    },
    **{
        f"{name}, {how}": {
            "optimizer": optimizer,
            "learning_rate": 0.02,
            "sparsity": 0.8,
            "update_every": 10,
            "script": "split_adamw.py",
            "optimizer_args": {"distribution": "uniform", "rescale_init": True, **grown},
        }
        for name, optimizer in (("RigLAdamW", "rigl_adamw"), ("SRigLAdamW", "srigl_adamw"))
        for how, grown in GROWN.items()
    },
}


def train(settings: dict[str, Any], dataset: str, steps: int, history: bool = False) -> dict[str, Any]:
    """One run in a process of its own; what its metrics.json holds, the history if asked for."""
    with tempfile.TemporaryDirectory() as folder:
        keys = {"dataset": dataset, "max_steps": steps, "save_strategy": "no", "eval_strategy": "no"}
        keys |= {"adam_epsilon": 1e-6, **settings}  # one for all
        script = keys.pop("script", None)
        program = ["-m", "gracile.train.pretrain"] if script is None else [str(Path(__file__).with_name(script))]
        command = [sys.executable, *program, "quickstart", f"--output_dir={folder}"]
        command += [f"--{k}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in keys.items()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        told: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
    wanted = (
        "validation_loss",
        "optimizer_state_bytes",
        "adamw_state_bytes",
        "tokens",
        "parameters",
        "weight_bytes",
        "gradient_bytes",
    )
    return {key: told[key] for key in (*wanted, *(["history"] if history else []))}


def in_turn(work: Callable[[Any], None], wanted: list[Any], jobs: int) -> None:
    """``work`` on each, ``jobs`` at a time; the first alone, since it fills the cache of packed text."""
    if wanted:
        work(wanted[0])
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(work, wanted[1:]):
            pass


def device() -> str:
    """What the runs compute on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, in the order of RUNS, the best learning rate of each."""
    best: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run["name"] not in best or run["validation_loss"] < best[run["name"]]["validation_loss"]:
            best[run["name"]] = run
    dense = best.get("AdamW, targets at a tenth")
    lines = [
        "| optimizer | learning rate | validation loss | above AdamW at two rates | optimizer state | of AdamW's |",
        "|---" * 6 + "|",
    ]
    for name in (n for n in RUNS if n in best):
        run = best[name]
        above = "" if dense is None else f"{run['validation_loss'] - dense['validation_loss']:+.3f}"
        size = run["optimizer_state_bytes"]
        lines.append(
            f"| {name} | {run['learning_rate']:g} | {run['validation_loss']:.3f} | {above} "
            f"| {size / 2**20:.2f} MiB | {size / run['adamw_state_bytes']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", default="stdlib", help="as the config's key: stdlib, or a text file")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="names of the config; by default all")
    parser.add_argument("--factors", type=float, nargs="+", default=(0.5, 1.0, 2.0), help="on the learning rates")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--results", type=Path, help="file of the results; by default named after the dataset")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    path = options.results or RESULTS / f"quickstart_{Path(options.dataset).stem}.json"
    told = json.loads(path.read_text()) if path.exists() else {"runs": []}

    wanted = [
        (name, settings, factor * settings["learning_rate"])
        for factor in options.factors
        for name, settings in RUNS.items()
        if not options.optimizers or settings["optimizer"] in options.optimizers
    ]
    done = {(run["name"], run["learning_rate"], run["steps"]) for run in told["runs"]}
    wanted = [run for run in wanted if (run[0], run[2], options.steps) not in done]
    told["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "device": device()}
    path.parent.mkdir(parents=True, exist_ok=True)

    def measure(run: tuple[str, dict[str, Any], float]) -> None:
        name, settings, rate = run
        found = train({**settings, "learning_rate": rate}, options.dataset, options.steps)
        with WRITING:
            told["runs"].append({"name": name, "learning_rate": rate, "steps": options.steps, **found})
            path.write_text(json.dumps(told, indent=1) + "\n")
            print(f"{name:<32} lr {rate:<8g} validation loss {found['validation_loss']:.4f}", flush=True)

    in_turn(measure, wanted, options.jobs)
    runs = [run for run in told["runs"] if run["steps"] == options.steps]
    tokens = runs[0]["tokens"]
    text = f"{options.steps} steps, {tokens:,} tokens, {runs[0]['parameters']:,} parameters\n\n{table(runs)}\n"
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
