"""What bf16 weights and bf16 moments lose, and what stochastic rounding gives back, as one table.

    python benchmarks/rounding.py                   # results/rounding.json and .md
    python benchmarks/rounding.py --jobs 12         # on a GPU

``gracile pretrain quickstart`` with weights and moments in fp32 and bf16, rounded to nearest and by chance. Runs that
are in the results file already are not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from typing import Any

import torch
from quickstart import RESULTS, WRITING, device, in_turn, train

BF16_WEIGHTS: dict[str, Any] = {"dtype": "bfloat16"}
BF16_MOMENTS: dict[str, Any] = {"state_dtype": "bfloat16"}
BY_CHANCE: dict[str, Any] = {"stochastic_rounding": True}
# name in the table -> settings, optimizer_args
PRECISIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all in fp32": ({}, {}),
    "bf16 weights, to nearest": (BF16_WEIGHTS, {}),
    "bf16 weights, by chance": (BF16_WEIGHTS, BY_CHANCE),
    "bf16 moments, to nearest": ({}, BF16_MOMENTS),
    "bf16 moments, by chance": ({}, BF16_MOMENTS | BY_CHANCE),
    "bf16 both, to nearest": (BF16_WEIGHTS, BF16_MOMENTS),
    "bf16 both, by chance": (BF16_WEIGHTS, BF16_MOMENTS | BY_CHANCE),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "GaLoreAdamW": {"optimizer": "galore_adamw", "learning_rate": 0.02},
    "FiraAdamW": {"optimizer": "fira_adamw", "learning_rate": 0.005},
    "APOLLOAdamW": {"optimizer": "apollo_adamw", "learning_rate": 0.01},
}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: the loss of each, its distance from fp32, means over seeds."""
    names = [name for name in OPTIMIZERS if any(run["optimizer"] == name for run in runs)]
    lines = [f"| | {' | '.join(names)} | optimizer state |", "|---" * (len(names) + 2) + "|"]
    losses: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        losses.setdefault((run["optimizer"], run["precision"]), []).append(run["validation_loss"])
    mean = {key: statistics.mean(found) for key, found in losses.items()}
    for precision in PRECISIONS:
        cells = []
        for name in names:
            loss, wide = mean.get((name, precision)), mean.get((name, next(iter(PRECISIONS))))
            cells.append("" if loss is None or wide is None else f"{loss:.4f} ({loss - wide:+.4f})")
        size = next((r["optimizer_state_bytes"] for r in runs if r["precision"] == precision), None)
        lines.append(f"| {precision} | {' | '.join(cells)} | {'' if size is None else f'{size / 2**20:.2f} MiB'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", default="stdlib")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=["GaLoreAdamW"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    path = RESULTS / "rounding.json"
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    wanted = [
        (name, precision, seed) for seed in options.seeds for precision in PRECISIONS for name in options.optimizers
    ]
    done = {(run["optimizer"], run["precision"], run["seed"]) for run in told["runs"]}
    told["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "device": device()}

    def measure(run: tuple[str, str, int]) -> None:
        name, precision, seed = run
        settings, keywords = PRECISIONS[precision]
        keys = {**OPTIMIZERS[name], **settings, "seed": seed, **({"optimizer_args": keywords} if keywords else {})}
        found = train(keys, options.dataset, options.steps)
        with WRITING:
            told["runs"].append({"optimizer": name, "precision": precision, "seed": seed, **found})
            path.write_text(json.dumps(told, indent=1) + "\n")
            print(f"{name:<12} {precision:<26} validation loss {found['validation_loss']:.4f}", flush=True)

    in_turn(measure, [run for run in wanted if run not in done], options.jobs)
    path.with_suffix(".md").write_text(table(told["runs"]))
    print(table(told["runs"]))


if __name__ == "__main__":
    main()
