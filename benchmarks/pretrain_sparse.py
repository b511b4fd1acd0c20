"""Optimizers of masks on one small run at equal tokens: validation perplexity beside dense and beside a static random
mask, as one table.

    python benchmarks/pretrain_sparse.py                       # 9m at 80 and 90 percent
    python benchmarks/pretrain_sparse.py --sparsity 0.9 --seeds 0 1 2

Each line is ``gracile pretrain quickstart`` with the settings of ``runs``. Every matrix of a block is as sparse as all,
masks change every thirtieth of the run until three quarters of it, and first weights are scaled to the fan-in they
have. Embeddings and the output layer train at the whole learning rate, the masked matrices at a part of it
(``split_adamw.py``), the same for all. Runs that are in the results file are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from quickstart import RESULTS, train

DENSE = "AdamW, dense"
STATIC = "static random mask"
BLOCK = 16  # divides the sides of the 9m model's matrices


def runs() -> dict[str, dict[str, Any]]:
    """name in the table -> settings"""
    every: dict[str, Any] = {"distribution": "uniform", "rescale_init": True}
    return {
        STATIC: {"optimizer": "sparse_adamw", "optimizer_args": every, "drop_fraction": 0},
        "SET": {"optimizer": "set_adamw", "optimizer_args": every},
        "RigL": {"optimizer": "rigl_adamw", "optimizer_args": every},
        "SRigL": {"optimizer": "srigl_adamw", "optimizer_args": every},
        f"BLaST, blocks of {BLOCK}": {"optimizer": "block_sparse_adamw", "optimizer_args": {"block_size": BLOCK}},
        "pruned by magnitude": {
            "optimizer": "sparse_adamw",
            "drop_fraction": 0,
            "optimizer_args": {"distribution": "uniform", "initial_sparsity": 0.0},
        },
    }


def table(told: list[dict[str, Any]]) -> str:
    """Markdown: one line a method, means over seeds."""
    heads = ["sparsity", "method", "loss", "perplexity", "of dense", "optimizer state"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for run in sorted(told, key=lambda run: run["sparsity"]):
        groups.setdefault((run["sparsity"], run["name"]), []).append(run)
    dense = [math.exp(run["validation_loss"]) for run in groups.get((0.0, DENSE), [])]
    for (sparsity, name), found in groups.items():
        perplexity = statistics.mean(math.exp(run["validation_loss"]) for run in found)
        spread = (
            f" ± {(max(p) - min(p)) / 2:.1f}" if len(p := [math.exp(r["validation_loss"]) for r in found]) > 1 else ""
        )
        cells = [f"{sparsity:.0%}", name, f"{statistics.mean(r['validation_loss'] for r in found):.3f}"]
        cells += [f"{perplexity:.1f}{spread}", f"{perplexity / statistics.mean(dense):.2f}" if dense else ""]
        cells += [f"{found[0]['optimizer_state_bytes'] / 2**20:.1f} MiB"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="9m")
    parser.add_argument("--sparsity", type=float, nargs="+", default=(0.8, 0.9))
    parser.add_argument("--learning_rate", type=float, default=0.02)
    parser.add_argument("--targets", type=float, default=0.1, help="factor on it for the matrices")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="examples of 128 tokens a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--only", nargs="+", default=(), help="names of methods")
    options = parser.parse_args()
    os.environ["TARGETS"] = str(options.targets)
    path = RESULTS / f"sparse_{options.model}.json"
    told = json.loads(path.read_text()) if path.exists() else {"runs": []}
    same = {"steps": options.steps, "batch": options.batch, "learning_rate": options.learning_rate}
    same["targets"] = options.targets
    wanted = [(0.0, DENSE, {"optimizer": "adamw"})]
    wanted += [(s, name, {**keys, "sparsity": s}) for s in options.sparsity for name, keys in runs().items()]
    for seed in options.seeds:
        for sparsity, name, keys in wanted:
            line = {"name": name, "sparsity": sparsity, "seed": seed, **same}
            if any(line.items() <= run.items() for run in told["runs"]) or (options.only and name not in options.only):
                continue
            settings = {**keys, "script": "split_adamw.py", "adam_epsilon": 1e-8, "model": options.model, "seed": seed}
            settings |= {"learning_rate": options.learning_rate, "warmup_steps": options.steps // 10}
            settings |= {"per_device_train_batch_size": options.batch, "validation_blocks": 200}
            if sparsity:
                settings["update_every"] = max(1, options.steps // 30)
            found = train(settings, "stdlib", options.steps)
            told["runs"].append({**line, **found})
            told["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
            path.write_text(json.dumps(told, indent=1) + "\n")
            print(f"{sparsity:4.0%} {name:<24} perplexity {math.exp(found['validation_loss']):.2f}", flush=True)
    chosen = [run for run in told["runs"] if same.items() <= run.items()]
    text = f"{options.model}, {options.steps} steps, {chosen[0]['tokens']:,} tokens\n\n{table(chosen)}\n"
    Path(path.with_suffix(".md")).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
