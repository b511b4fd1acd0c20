"""The plan of ``gracile memory`` beside what ``gracile profile`` measures, on one process.

python benchmarks/planned_memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys

RUNS = [
    (size, optimizer, more)
    for size, batch in (("2m", 16), ("9m", 4), ("60m", 2))
    for optimizer, more in (
        ("galore_adamw", ["--per_device_train_batch_size", str(batch)]),
        ("ldadamw", ["--per_device_train_batch_size", str(batch), "--gradient_checkpointing", "true"]),
        ("adamw", ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", "2"]),
    )
]


def main() -> None:
    print(
        "| model | optimizer | run | weights, gradients, state | activations | temporary | activations, MiB "
        "| optimizer's step | MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for size, optimizer, more in RUNS:
        command = [sys.executable, "-m", "gracile.train.profile", "quickstart", "--json", "--steps", "1"]
        command += ["--model", size, "--optimizer", optimizer, *more]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        planned, measured = told["planned"], told["measured"]
        passes = ("activations", "temporary")
        step = "optimizer's step"
        bytes_off = sum(abs(measured[kind] - planned[kind]) for kind in planned if kind not in (*passes, step))
        off = [f"{measured[kind] / planned[kind] - 1:+.2%}" for kind in passes]
        run = {"--gradient_checkpointing": "checkpointed", "--gradient_accumulation_steps": "accumulated"}
        name = next((run[word] for word in more if word in run), "plain")
        mib = measured["activations"] / 2**20
        last = f"{measured[step] - planned[step]} bytes off | {measured[step] / 2**20:.1f}"
        print(
            f"| {size} | {optimizer} | {name} | {bytes_off} bytes off | {off[0]} | {off[1]} | {mib:.1f} | {last} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
