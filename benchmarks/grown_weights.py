"""The loss at changes of masks: RigL and SRigL whose grown weights count their matrix's steps, their own, and their own
with a warm-up, as a picture.

    python benchmarks/grown_weights.py              # results/grown_weights.json and .png
    python benchmarks/grown_weights.py --jobs 12    # on a GPU

``gracile pretrain quickstart`` for 1000 steps, masks changed at every hundredth until step 750, the loss of each step.
Runs of one seed see the same batches, so the difference of two of them at a step leaves out what the batch brings.
Runs that are in the results file already are not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from quickstart import GROWN, RESULTS, WRITING, device, in_turn, train

EVERY = 100  # steps between changes of masks
WARMUP = 50
METHODS = {"RigL": "rigl_adamw", "SRigL": "srigl_adamw"}
SHARED, OWN, RISING = GROWN
COLOURS = {SHARED: "#b04a3a", OWN: "#c99a2e", RISING: "#2f6f8f"}


def settings(method: str, how: str, seed: int, rate: float) -> dict[str, Any]:
    grown = dict(GROWN[how])
    if "grown_warmup" in grown:
        grown["grown_warmup"] = WARMUP
    return {
        "optimizer": METHODS[method],
        "learning_rate": rate,
        "sparsity": 0.8,
        "update_every": EVERY,
        "script": "split_adamw.py",
        "optimizer_args": {"distribution": "uniform", "rescale_init": True, **grown},
        "logging_steps": 1,
        "seed": seed,
    }


def picture(runs: list[dict[str, Any]]) -> plt.Figure:
    """Losses above those of the run with a warm-up at the same step and seed, means over seeds. Above: over the whole
    run, a mean of ten steps. Below: after a change, a mean over changes, from where it was before them."""
    figure, axes = plt.subplots(2, len(METHODS), figsize=(11, 6.5), sharey="row", layout="constrained")
    for column, method in enumerate(METHODS):
        of_method = [run for run in runs if run["method"] == method]
        above, below = axes[0][column], axes[1][column]
        for how in (SHARED, OWN):
            steps, excess = excess_of(of_method, how)
            above.plot(steps, smooth(excess, 10), color=COLOURS[how], lw=1.2, label=how)
            after, rise = after_changes(of_method, excess)
            below.plot(after, smooth(rise, 3), color=COLOURS[how], label=how)
        for change in changes(of_method):
            above.axvline(change, color="0.85", lw=0.8, zorder=0)
        below.axvline(0, color="0.85", lw=0.8, zorder=0)
        for axis in (above, below):
            axis.axhline(0, color="0.6", lw=0.8)
            axis.legend(frameon=False)
        above.set(title=method, xlabel="step (lines: changes of masks)", xlim=(30, None))
        below.set(xlabel="steps after a change of masks")
    axes[0][0].set_ylabel(f"loss above “{RISING}”")
    axes[1][0].set_ylabel("and above what it was\nin the ten steps before")
    return figure


def changes(runs: list[dict[str, Any]]) -> range:
    return range(EVERY, int(0.75 * len(runs[0]["losses"])) + 1, EVERY)


def mean_over(rows: list[list[float]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def smooth(losses: list[float], width: int) -> list[float]:
    return [statistics.mean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]


def excess_of(runs: list[dict[str, Any]], how: str) -> tuple[range, list[float]]:
    """Steps, and the loss above that of the run with a warm-up, a mean over seeds."""
    by_seed = {(run["how"], run["seed"]): run["losses"] for run in runs}
    rows = [
        [loss - beside for loss, beside in zip(losses, by_seed[RISING, seed], strict=True)]
        for (name, seed), losses in by_seed.items()
        if name == how
    ]
    return range(1, len(rows[0]) + 1), mean_over(rows)


def after_changes(runs: list[dict[str, Any]], excess: list[float]) -> tuple[range, list[float]]:
    """Steps around a change, and how far the excess is from its mean in the ten steps before, a mean over changes."""
    around = range(-10, EVERY - 10)
    rows = []
    for change in changes(runs):
        before = statistics.mean(excess[change - 10 : change])
        rows.append([excess[change + step] - before for step in around])
    return around, mean_over(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", default="stdlib")
    parser.add_argument("--learning_rate", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    path = RESULTS / "grown_weights.json"
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    wanted = [(method, how, seed) for seed in options.seeds for method in METHODS for how in GROWN]
    wanted = [run for run in wanted if run not in {(r["method"], r["how"], r["seed"]) for r in told["runs"]}]
    if wanted:
        told["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "device": device()}

    def measure(run: tuple[str, str, int]) -> None:
        method, how, seed = run
        found = train(settings(method, how, seed, options.learning_rate), options.dataset, options.steps, history=True)
        losses = [round(line["loss"], 4) for line in found.pop("history") if "loss" in line]
        with WRITING:
            told["runs"].append({"method": method, "how": how, "seed": seed, "losses": losses, **found})
            path.write_text(json.dumps(told) + "\n")
            print(f"{method:<6} {how:<20} seed {seed} validation loss {found['validation_loss']:.4f}", flush=True)

    in_turn(measure, wanted, options.jobs)
    picture(told["runs"]).savefig(path.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
