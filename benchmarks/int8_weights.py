"""What weights in 8 bits lose against fp32 ones, rounded by chance and to nearest, as one table.

    python benchmarks/int8_weights.py               # results/int8_weights.json and .md

``gracile pretrain quickstart`` three times. Runs that are in the results file already are not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch
from quickstart import RESULTS, device, train

# name in the table -> settings
WEIGHTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "8 bits, by chance": {"weight_bits": 8},
    "8 bits, to nearest": {"weight_bits": 8, "optimizer_args": {"stochastic_rounding": False}},
}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown: the loss of each, its distance from fp32, and what is held."""
    lines = ["| weights | validation loss | weights | optimizer state |", "|---|---|---|---|"]
    for name, found in runs.items():
        off = found["validation_loss"] - runs["fp32"]["validation_loss"]
        held = (f"{found[key] / 2**20:.2f} MiB" for key in ("weight_bytes", "optimizer_state_bytes"))
        lines.append(f"| {name} | {found['validation_loss']:.4f} ({off:+.4f}) | {' | '.join(held)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", default="stdlib")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    path = RESULTS / "int8_weights.json"
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    told["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "device": device()}
    for name, settings in WEIGHTS.items():
        if name not in told["runs"]:
            keys = {"optimizer": "galore_adamw", "learning_rate": 0.02, **settings}
            told["runs"][name] = train(keys, options.dataset, options.steps)
            path.write_text(json.dumps(told, indent=1) + "\n")
            print(f"{name:<20} validation loss {told['runs'][name]['validation_loss']:.4f}", flush=True)
    path.with_suffix(".md").write_text(table(told["runs"]))
    print(table(told["runs"]))


if __name__ == "__main__":
    main()
