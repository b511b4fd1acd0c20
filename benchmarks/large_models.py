"""A large model really trained on a small machine: what a recipe's plan says it needs, and what its process held.

    python benchmarks/large_models.py llama_7b_galore_24gb --output runs/large    # 18 GiB of memory, 50 of disk
    python benchmarks/large_models.py llama_7b_galore_24gb --model 1b --rank 512  # the same in minutes

The recipe trains from random weights, an example of 128 tokens a step of the text that comes with Python, by ``gracile
pretrain`` on the CPU. After ``--save_at`` steps, the first of which finds all subspaces, its checkpoint is on the disk,
and the process is killed with SIGKILL. A second one goes on from there to the end. As many ``--steps`` as ``--save_at``
leave the second process out.

The resident memory of each process is read twice a second, and its peak from the kernel. It is compared with the plan
of ``gracile memory`` for the same configuration, plus what the same command holds with the smallest model: interpreter,
libraries, data. Freed memory is given back at once (MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at 1 MiB, one
arena), as it is on a machine where the model only just fits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import safe_open

import gracile
from gracile.models import SIZES

RESULTS = Path(__file__).parent / "results"
CONFIGS = Path(gracile.__file__).parent / "configs"
GIB = 2**30
TOKENS = 128  # of a step
OF_DATA = ("dataset_config", "tokenizer", "eval_steps")  # keys of a recipe that are about its own data
SETTINGS: dict[str, Any] = {
    "dataset": "stdlib",
    "block_size": TOKENS,
    "validation_blocks": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "eval_strategy": "no",
    "logging_steps": 1,
    "save_total_limit": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
SMALLEST = "2m"


class Sample(NamedTuple):
    """A moment of a process: seconds since it began, and GiB that are resident, of them those of files."""

    seconds: float
    resident: float
    of_files: float


class Watched(NamedTuple):
    """A process from its beginning to its end."""

    peak: float  # GiB
    seconds: float
    samples: list[Sample]
    printed: list[str]


def configuration(recipe: str, folder: Path, steps: int, save_at: int, **changed: Any) -> Path:
    """The recipe for text and a device that are here."""
    settings = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in OF_DATA}
    run = {"output_dir": str(folder / "run"), "max_steps": steps, "save_steps": save_at}
    file = folder / f"{recipe}.yaml"
    file.write_text(yaml.safe_dump({**kept, **SETTINGS, **run, **changed}), encoding="utf-8")
    return file


def planned(file: Path) -> float:
    """GiB at the peak, by ``gracile memory``."""
    command = [sys.executable, "-m", "gracile.train.memory", str(file), "--json"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(told[told.index("{") :])
    (plan,) = found["optimizers"].values()
    return (plan["checkpointed"] if found["checkpointed"] else plan)["peak"] / GIB


def watched(command: list[str], log: Path, until: Path | None = None) -> Watched:
    """A process that is watched to its end, or killed with SIGKILL when a file is there."""
    began, samples, peak = time.monotonic(), [], 0.0
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **MALLOC})
        try:
            while process.poll() is None:
                held = _status(process.pid)
                if held:
                    peak = max(peak, held["VmHWM"])
                    samples.append(Sample(time.monotonic() - began, held["VmRSS"], held["RssFile"]))
                if until is not None and until.is_file():
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.5)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    printed = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("step ")]
    if process.returncode != (0 if until is None else -signal.SIGKILL):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}; see {log}")
    return Watched(peak, time.monotonic() - began, samples, printed)


def _status(pid: int) -> dict[str, float]:
    """GiB by the kernel's names; nothing where the process is at its beginning or its end."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.split()}
    return {name: int(found[name]) / 2**20 for name in ("VmHWM", "VmRSS", "RssFile") if name in found}


def pretrain(file: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "gracile.train.pretrain", str(file), *more]


def are_finite(weights: Path) -> bool:
    """Of a saved model, a tensor at a time."""
    with safe_open(weights, "pt") as opened:
        names = [*opened.keys()]
    return all(torch.isfinite(_read(weights, name)).all() for name in names)


def _read(weights: Path, name: str) -> torch.Tensor:
    with safe_open(weights, "pt") as opened:
        return opened.get_tensor(name)


def trained(recipe: str, folder: Path, steps: int, save_at: int, **changed: Any) -> dict[str, Any]:
    """One recipe: its plan, its processes, and what is left of them."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny = folder / "smallest"
    tiny.mkdir(exist_ok=True)
    smallest = configuration(recipe, tiny, 1, 1, **{**changed, "model": SMALLEST, "rank": 1})
    constant = watched(pretrain(smallest, "--output_dir", str(tiny / "run")), tiny / "log.txt").peak
    shutil.rmtree(tiny)

    file = configuration(recipe, folder, steps, save_at, **changed)
    plan = planned(file)
    print(f"{recipe}: planned {plan:.2f} GiB, and {constant:.2f} with the smallest model", flush=True)
    sealed = folder / "run" / f"checkpoint-{save_at}" / "complete.json"
    again = steps > save_at
    runs = {"from random weights": watched(pretrain(file), folder / "first.txt", sealed if again else None)}
    print(f"{runs['from random weights'].peak:.2f} GiB in {runs['from random weights'].seconds:.0f} s", flush=True)
    if again:
        resume = pretrain(file, "--resume_from_checkpoint", "true")
        runs["from the checkpoint, after SIGKILL"] = watched(resume, folder / "second.txt")
    assert all(map(are_finite, (folder / "run").glob("model*.safetensors")))
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {
        "recipe": recipe,
        "model": settings["model"],
        "optimizer": settings["optimizer"],
        "planned": plan,
        "smallest": constant,
        "runs": {name: _told(run, plan, constant) for name, run in runs.items()},
    }


def _told(run: Watched, plan: float, constant: float) -> dict[str, Any]:
    return {
        "peak": run.peak,
        "of_plan": (run.peak - constant) / plan,
        "seconds": run.seconds,
        "steps": run.printed,
        "resident": [[round(number, 2) for number in sample] for sample in _thinned(run.samples)],
    }


def _thinned(samples: list[Sample], most: int = 120) -> Iterator[Sample]:
    """The largest of each of some spans of time."""
    size = -(-len(samples) // most)
    for begin in range(0, len(samples), size or 1):
        yield max(samples[begin : begin + size], key=lambda sample: sample.resident)


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "| recipe | model | process | planned | smallest model | resident | (resident - smallest) / planned | min |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in found:
        for name, run in one["runs"].items():
            yield (
                f"| {one['recipe']} | {one['model']} | {name} | {one['planned']:.2f} GiB | {one['smallest']:.2f} GiB "
                f"| {run['peak']:.2f} GiB | {run['of_plan']:.3f} | {run['seconds'] / 60:.0f} |"
            )


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return (
        f"{os.cpu_count()} CPU cores, {memory:.1f} GiB, torch {torch.__version__}, Python {platform.python_version()}"
    )


def write(found: dict[str, Any], results: Path) -> None:
    """Beside what other recipes gave before."""
    file = results / "large_models.json"
    before = json.loads(file.read_text(encoding="utf-8"))["found"] if file.is_file() else []
    same = (found["recipe"], found["model"])
    all_found = [one for one in before if (one["recipe"], one["model"]) != same] + [found]
    file.write_text(json.dumps({"machine": machine(), "found": all_found}, indent=1) + "\n", encoding="utf-8")
    lines = [f"{machine()}; {TOKENS} tokens a step", "", *table(all_found), ""]
    for one in all_found:
        for name, run in one["runs"].items():
            lines += [f"{one['recipe']}, {one['model']}, {name}:", "", *(f"    {step}" for step in run["steps"]), ""]
    (results / "large_models.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--model", choices=sorted(SIZES), help="another size than the recipe's")
    parser.add_argument("--rank", type=int, help="another rank than the recipe's")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--save_at", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/large"), help="a folder that is not there yet")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.output.exists():
        parser.error(f"--output {str(given.output)!r} is there already; give a folder that is not")
    changed = {key: value for key, value in (("model", given.model), ("rank", given.rank)) if value is not None}
    found = trained(given.recipe, given.output, given.steps, given.save_at, **changed)
    write(found, given.results)
    print("\n".join(table([found])))


if __name__ == "__main__":
    main()
