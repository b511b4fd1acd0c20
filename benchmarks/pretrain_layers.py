"""Layers that store less, from scratch on one small run at equal tokens: validation perplexity and bytes, as one table.

    python benchmarks/pretrain_layers.py                       # 9m, every method at a fifth of the layers' parameters
    python benchmarks/pretrain_layers.py --factors 1 2         # and twice each learning rate, of which the best counts

Each line is ``gracile pretrain quickstart`` with the settings of ``RUNS``. The four methods with a rank or a density
have as many parameters in each layer, to one rank, as ``--keep`` says: of an m x n layer a fifth, that is a parameter
sparsity of 0.8. ReLoRA and SST also keep what they do not train. Runs that are in the results file are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from quickstart import RESULTS, train

from gracile.models import SIZES

DENSITY = 0.03


def runs(model: str, keep: float, steps: int) -> dict[str, dict[str, Any]]:
    """name in the table -> settings, with ranks of the same number of trained parameters in a square layer."""
    h = SIZES[model]["hidden_size"]
    rank = max(1, round(keep * h / 2))
    sparse = max(1, round((keep - DENSITY) * h / 2))
    cycle = steps // 4
    layer = {"adam_epsilon": 1e-8}
    return {
        "AdamW, full rank": {"optimizer": "adamw", "learning_rate": 0.002},
        "GaLore": {"optimizer": "galore_adamw", "rank": rank, "learning_rate": 0.02},
        "SLTrain": {
            **layer,
            "optimizer": "sltrain_adamw",
            "layer": "sltrain",
            "rank": sparse,
            "layer_args": {"density": DENSITY, "alpha": 32.0},
            "learning_rate": 0.004,
        },
        "SST": {
            **layer,
            "optimizer": "sst_adamw",
            "layer": "sst",
            "rank": rank,
            "optimizer_args": {"swap_every": max(1, steps // 30), "warmup_steps": max(1, steps // 300)},
            "learning_rate": 0.004,
        },
        "ReLoRA": {
            **layer,
            "optimizer": "relora_adamw",
            "layer": "relora",
            "rank": rank,
            "layer_args": {"alpha": 32.0},
            "optimizer_args": {"merge_every": cycle},
            "lr_restart_every": cycle,
            "lr_restart_warmup": max(1, steps // 60),
            "learning_rate": 0.004,
        },
        "W = B A": {**layer, "optimizer": "adamw", "layer": "low_rank", "rank": rank, "learning_rate": 0.004},
    }


def table(told: list[dict[str, Any]]) -> str:
    """Markdown, the best learning rate of each."""
    best: dict[str, dict[str, Any]] = {}
    for run in told:
        if run["name"] not in best or run["validation_loss"] < best[run["name"]]["validation_loss"]:
            best[run["name"]] = run
    head = "| method | rank | learning rate | validation loss | perplexity | weights | gradients | optimizer state |"
    lines = [head, "|---" * 8 + "|"]
    for name, run in best.items():
        sizes = (f"{run[key] / 2**20:.1f} MiB" for key in ("weight_bytes", "gradient_bytes", "optimizer_state_bytes"))
        loss = run["validation_loss"]
        cells = [name, run["rank"] or "", f"{run['learning_rate']:g}", f"{loss:.3f}", f"{math.exp(loss):.1f}", *sizes]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="9m")
    parser.add_argument("--keep", type=float, default=0.2, help="trained parameters of a layer, of its dense ones")
    parser.add_argument("--factors", type=float, nargs="+", default=(1.0,), help="on the learning rates")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8, help="examples of 128 tokens a step")
    parser.add_argument("--only", nargs="+", default=(), help="names of methods")
    options = parser.parse_args()
    path = RESULTS / f"layers_{options.model}_{options.keep:g}.json"
    told = json.loads(path.read_text()) if path.exists() else {"runs": []}
    same = {"steps": options.steps, "batch": options.batch}
    for factor in options.factors:
        for name, settings in runs(options.model, options.keep, options.steps).items():
            rate = factor * settings["learning_rate"]
            wanted = {"name": name, "learning_rate": rate, **same}
            if (options.only and name not in options.only) or any(
                wanted.items() <= run.items() for run in told["runs"]
            ):
                continue
            keys = {**settings, "model": options.model, "learning_rate": rate, "warmup_steps": options.steps // 10}
            found = train({**keys, "per_device_train_batch_size": options.batch}, "stdlib", options.steps)
            told["runs"].append({**wanted, "rank": settings.get("rank"), **found})
            told["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(told, indent=1) + "\n")
            print(f"{name:<18} lr {rate:<8g} perplexity {math.exp(found['validation_loss']):.2f}", flush=True)
    chosen = [run for run in told["runs"] if same.items() <= run.items()]
    text = f"{options.model}, {options.steps} steps, {chosen[0]['tokens']:,} tokens\n\n{table(chosen)}\n"
    Path(path.with_suffix(".md")).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
