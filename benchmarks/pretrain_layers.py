"""Layers that store less, from scratch on one small run at equal tokens: validation perplexity and bytes, as one table.

    python benchmarks/pretrain_layers.py                       # 9m, every method at a fifth of the layers' parameters
    python benchmarks/pretrain_layers.py --targets 0.1 0.2     # two learning rates of the layers, the best counts

Each line is ``gracile pretrain quickstart`` with the settings of ``runs``. Embeddings and the output layer have the
same learning rate everywhere; the layers, or their matrices, a part of it (``split_adamw.py``; GaLore scales its
updates). The methods with a rank or a density train as many parameters of a square layer, to one rank, as ``--keep``
says: a fifth, which is a parameter sparsity of 0.8. ReLoRA and SST also keep what they do not train. Runs that are in
the results file are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
    cycle = steps // 4
    split = {"script": "split_adamw.py", "adam_epsilon": 1e-8}
    return {
        "AdamW, full rank": {**split, "optimizer": "adamw"},
        "GaLore": {"optimizer": "galore_adamw", "rank": rank},
        "SLTrain": {
            **split,
            "optimizer": "sltrain_adamw",
            "layer": "sltrain",
            "rank": max(1, round((keep - DENSITY) * h / 2)),
            "layer_args": {"density": DENSITY, "alpha": 32.0},
        },
        "SST": {
            **split,
            "optimizer": "sst_adamw",
            "layer": "sst",
            "rank": rank,
            "optimizer_args": {"swap_every": max(1, steps // 30), "warmup_steps": max(1, steps // 300)},
        },
        "ReLoRA": {
            **split,
            "optimizer": "relora_adamw",
            "layer": "relora",
            "rank": rank,
            "layer_args": {"alpha": 32.0},
            "optimizer_args": {"merge_every": cycle},
            "lr_restart_every": cycle,
            "lr_restart_warmup": max(1, steps // 60),
        },
        "W = B A": {**split, "optimizer": "adamw", "layer": "low_rank", "rank": rank},
    }


def table(told: list[dict[str, Any]]) -> str:
    """Markdown, the best learning rate of each."""
    best: dict[str, dict[str, Any]] = {}
    for run in told:
        if run["name"] not in best or run["validation_loss"] < best[run["name"]]["validation_loss"]:
            best[run["name"]] = run
    heads = ["method", "rank", "layers' rate", "loss", "perplexity", "weights", "gradients", "optimizer state"]
    lines = [f"| {' | '.join(heads)} |", "|---" * 8 + "|"]
    for name, run in best.items():
        sizes = (f"{run[key] / 2**20:.1f} MiB" for key in ("weight_bytes", "gradient_bytes", "optimizer_state_bytes"))
        loss = run["validation_loss"]
        rate = "" if run["targets"] is None else f"{run['targets'] * run['learning_rate']:g}"
        cells = [name, run["rank"] or "", rate, f"{loss:.3f}", f"{math.exp(loss):.1f}", *sizes]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="9m")
    parser.add_argument("--keep", type=float, default=0.2, help="trained parameters of a layer, of its dense ones")
    parser.add_argument("--learning_rate", type=float, default=0.02)
    parser.add_argument("--targets", type=float, nargs="+", default=(0.1,), help="factors on it for the layers")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8, help="examples of 128 tokens a step")
    parser.add_argument("--only", nargs="+", default=(), help="names of methods")
    options = parser.parse_args()
    path = RESULTS / f"layers_{options.model}_{options.keep:g}.json"
    told = json.loads(path.read_text()) if path.exists() else {"runs": []}
    same = {"steps": options.steps, "batch": options.batch}
    for factor in options.targets:
        for name, settings in runs(options.model, options.keep, options.steps).items():
            rate = {"learning_rate": options.learning_rate, "targets": factor if "script" in settings else None}
            wanted = {"name": name, **rate, **same}
            known = any(wanted.items() <= run.items() for run in told["runs"])
            if known or (options.only and name not in options.only):
                continue
            os.environ["TARGETS"] = str(factor)
            keys = {**settings, "model": options.model, "learning_rate": options.learning_rate}
            keys |= {"warmup_steps": options.steps // 10, "per_device_train_batch_size": options.batch}
            found = train(keys, "stdlib", options.steps)
            told["runs"].append({**wanted, "rank": settings.get("rank"), **found})
            told["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(told, indent=1) + "\n")
            print(f"{name:<18} layers at {factor:g}  perplexity {math.exp(found['validation_loss']):.2f}", flush=True)
    chosen = [run for run in told["runs"] if same.items() <= run.items()]
    text = f"{options.model}, {options.steps} steps, {chosen[0]['tokens']:,} tokens\n\n{table(chosen)}\n"
    Path(path.with_suffix(".md")).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
