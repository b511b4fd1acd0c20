"""Every adapter, selection and full fine-tuning, at equal tokens and two learning rates each: what is trained, what it
costs, what is learnt of a new text and what is forgotten of the old one, as a table and a picture.

    python benchmarks/finetune.py --train wikitext/valid.txt --validation wikitext/test.txt
    python benchmarks/finetune.py --train ... --validation ... --runs LoRA SORSA --steps 100

The base is ``gracile pretrain quickstart`` at the size ``--model``: source text of the standard library. Each line is
``gracile finetune`` on it with the settings of ``RUNS``; the better learning rate counts, by the loss on the new text.
The old text is some of the base's own; of both texts ``SAMPLE`` characters are evaluated on. Runs that are in the
results file already are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
WRITING = threading.Lock()
SAMPLE = 40_000
KEPT = {
    f"MALLOC_{limit}_THRESHOLD_": str(2**32) for limit in ("MMAP", "TRIM")
}  # large blocks: to get each anew is a third of a run
ADAPTER, SELECTION, FULL = "adapter", "selection", "all weights"


def adapter(name: str, rates: tuple[float, float], /, **keys: Any) -> dict[str, Any]:
    return {"kind": ADAPTER, "rates": rates, "adapter": name, "adapter_args": keys}


def selection(name: str, rates: tuple[float, float], /, **keys: Any) -> dict[str, Any]:
    return {"kind": SELECTION, "rates": rates, "selection": name, "selection_args": keys}


def full(optimizer: str, rates: tuple[float, float], /, **keys: Any) -> dict[str, Any]:
    return {"kind": FULL, "rates": rates, "optimizer": optimizer, **keys}


# name in the table -> its learning rates and settings; ranks of 16 where there is one, as the optimizers' below
RUNS: dict[str, dict[str, Any]] = {
    "LoRA": adapter("lora", (2e-3, 8e-3), r=16, lora_alpha=16),
    "PiSSA": adapter("lora", (1e-3, 4e-3), r=16, lora_alpha=16, init_lora_weights="pissa"),
    "rsLoRA": adapter("lora", (5e-4, 2e-3), r=16, lora_alpha=16, use_rslora=True),
    "DoRA": adapter("lora", (2e-3, 8e-3), r=16, lora_alpha=16, use_dora=True),
    "EVA": adapter("lora", (2e-3, 8e-3), r=16, lora_alpha=16, init_lora_weights="eva"),
    "CorDA": adapter("lora", (1e-3, 4e-3), r=16, lora_alpha=16, init_lora_weights="corda"),
    "LoRA-GA": adapter("lora", (1e-3, 4e-3), r=16, lora_alpha=16, init_lora_weights="lora_ga"),
    "MiSS": adapter("miss", (1e-3, 4e-3), r=32),
    "ALLoRA": adapter("allora", (1e-3, 4e-3), r=16),
    "AlignGuard-LoRA": adapter("alignguard", (2e-3, 8e-3), r=16),
    "BA-LoRA": adapter("balora", (1e-3, 4e-3), r=16),
    "DSEE": adapter("dsee", (2e-3, 8e-3), r=16, alpha=16),
    "Intrinsic dimension": adapter("intrinsicdimension", (3e-3, 3e-2), d=2000),
    "LoRA-SB": adapter("lorasb", (2e-3, 8e-3), r=32, lr=1e-4),
    "LoRA-XS": adapter("loraxs", (4e-3, 2e-2), r=32),
    "Mask tuning": adapter("masktuning", (1e-4, 5e-4)),
    "PST": adapter("pst", (2e-3, 8e-3), r=8, sparsity=0.2),
    "SoKA": adapter("soka", (1e-3, 4e-3), r=16),
    "SORSA": adapter("sorsa", (1e-3, 4e-3), r=16, gamma=0.01),
    "SPP": adapter("spp", (4e-3, 2e-2)),
    "SVFit": adapter("svfit", (1e-2, 5e-2), r=128, parametrization="relative"),
    "HFT": selection("hft", (5e-4, 2e-3)),
    "S2FT": selection("s2ft", (1e-3, 4e-3), down_ratio=0.05, o_ratio=0.25),
    "SaRA": selection("sara", (1e-3, 4e-3), share=0.1),
    "AdamW, all weights": full("adamw", (5e-4, 2e-3)),
    "GaLore": full("galore_adamw", (2e-3, 8e-3), rank=16, update_proj_gap=20, scale=0.25),
    "Fira": full("fira_adamw", (1e-3, 4e-3), rank=16, update_proj_gap=20, scale=0.25),
    "APOLLO": full("apollo_adamw", (1e-3, 4e-3), rank=16, update_proj_gap=20, scale=1),
    "GaLore, 8 bits": full("galore_adamw_8bit", (2e-3, 8e-3), rank=16, update_proj_gap=20, scale=0.25),
}
COMMON = {
    "format": "text",
    "block_size": 128,
    "packing": True,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_strategy": "no",
    "seed": 0,
    "report_to": "none",
    "disable_tqdm": True,
}


def command(word: str, *arguments: str, threads: int) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", f"gracile.train.{word}", *arguments]
    given = {**os.environ, **KEPT, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(run, capture_output=True, text=True, env=given, check=False)


def samples(validation: str, folder: Path) -> dict[str, str]:
    """Files with the beginnings of the new text and of the old one."""
    modules = ("argparse", "inspect", "tarfile", "typing", "subprocess")
    files = [Path(str(util.find_spec(name).origin)) for name in modules]  # type: ignore[union-attr]
    texts = {"validation_dataset": [Path(validation)], "forgetting_dataset": files}
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for key, paths in texts.items():
        text = "".join(path.read_text(encoding="utf-8") for path in paths)[:SAMPLE]
        found[key] = str(folder / f"{key}.txt")
        Path(found[key]).write_text(text, encoding="utf-8")
    return found


def pretrained(folder: Path, model: str, threads: int) -> Path:
    """The base model, made once."""
    if not (folder / "metrics.json").exists():
        done = command("pretrain", "quickstart", "--model", model, "--output_dir", str(folder), threads=threads)
        if done.returncode:
            sys.exit(f"the base: {done.stderr.strip()[-500:]}")
    return folder


def run(name: str, rate: float, given: argparse.Namespace, base: Path) -> dict[str, Any]:
    own = {key: value for key, value in RUNS[name].items() if key not in ("kind", "rates")}
    if own.get("adapter") == "pst":
        own["adapter_args"] = {**own["adapter_args"], "total_steps": given.steps}
    keys = {**COMMON, **own, **given.texts, "model": str(base), "dataset": given.train}
    keys |= {"learning_rate": rate, "max_steps": given.steps, "warmup_steps": max(1, given.steps // 10)}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        config.write_text(json.dumps({**keys, "output_dir": f"{folder}/out"}))  # JSON is YAML
        done = command("finetune", str(config), threads=given.threads)
        if done.returncode:
            return {"name": name, "rate": rate, "error": done.stderr.strip().splitlines()[-1][-300:]}
        told = json.loads((Path(folder) / "out" / "metrics.json").read_text())
    kept = ("trainable_parameters", "gradient_bytes", "optimizer_state_bytes", "peak_memory_bytes", "tokens_per_second")
    more = ("validation_loss", "validation_loss_before", "forgetting_loss", "forgetting_loss_before")
    return {"name": name, "rate": rate, **{key: told.get(key) for key in (*kept, *more)}}


def perplexity(loss: float | None) -> str:
    return "" if loss is None else f"{math.exp(loss):.1f}" if loss < 20 else "over 1e8"


def best_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each line its better run; those that failed last."""
    found: dict[str, dict[str, Any]] = {}
    for one in results["runs"]:
        loss = one.get("validation_loss")
        loss = math.inf if loss is None or math.isnan(loss) else loss
        if one["name"] not in found or loss < found[one["name"]]["order"]:
            found[one["name"]] = {**one, "order": loss}
    return dict(sorted(found.items(), key=lambda item: item[1]["order"]))


def learnt(one: dict[str, Any]) -> list[str]:
    """A rate, and the perplexities of both texts after it."""
    return [f"{one['rate']:g}", *(perplexity(one[key]) for key in ("validation_loss", "forgetting_loss"))]


def table(results: dict[str, Any]) -> str:
    best = best_of(results)
    first = next(iter(best.values()))
    new, old = (perplexity(first.get(f"{part}_loss_before")) for part in ("validation", "forgetting"))
    columns = ("method", "what is trained", "numbers", "state, MiB", "peak, MiB", "tokens/s", "rate", "new", "old",
               "other rate", "new", "old")  # fmt: skip
    lines = [
        f"{results['model']} model, {results['steps']} steps of 2,048 tokens.",
        f"Perplexity before: new text {new}, old text {old}.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, one in best.items():
        cells = [name, RUNS[name]["kind"]]
        if "error" in one:
            cells += [f"failed: {one['error']}", *[""] * 9]
        else:
            mib = [one[key] / 2**20 for key in ("optimizer_state_bytes", "peak_memory_bytes")]
            cells += [f"{one['trainable_parameters']:,}", f"{mib[0]:.2f}", f"{mib[1]:,.0f}"]
            others = [r for r in results["runs"] if r["name"] == name and r["rate"] != one["rate"] and "error" not in r]
            speed = max(r["tokens_per_second"] for r in (one, *others))  # the other was beside something else
            cells += [f"{speed:,.0f}", *learnt(one)]
            cells += learnt(others[0]) if others else [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def label(panel: Any, points: list[tuple[float, float, str]]) -> None:
    """Names beside their points, each at the nearest place where it covers neither a point nor another name."""
    panel.figure.draw_without_rendering()  # which fixes the scales
    unit = panel.figure.dpi / 72  # pixels of a point of type
    centres = panel.transData.transform([(cost, value) for cost, value, _ in points])
    frame = panel.get_window_extent()
    taken = [(x - 3 * unit, y - 3 * unit, x + 3 * unit, y + 3 * unit) for x, y in centres]
    places = sorted(itertools.product(range(-160, 161, 10), range(-297, 298, 9)), key=lambda at: math.hypot(*at))
    for (x, y), (cost, value, name) in zip(centres, points, strict=True):
        width, height = 4 * len(name) * unit, 9 * unit
        for dx, dy in places:
            left, low = x + (dx if dx > 0 else dx - width / unit if dx < 0 else -width / unit / 2) * unit, y + dy * unit
            box = left, low - height / 2, left + width, low + height / 2
            inside = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1
            if inside and not any(a[0] < box[2] and box[0] < a[2] and a[1] < box[3] and box[1] < a[3] for a in taken):
                break
        taken.append(box)
        panel.annotate(
            name,
            (cost, value),
            xytext=((box[0] + box[2] - 2 * x) / 2 / unit, dy),
            textcoords="offset points",
            fontsize=6.5,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )


def picture(results: dict[str, Any], path: Path) -> None:
    """Memory that is trained and its moments, against what is learnt and what is forgotten."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6.5), sharex=True, layout="constrained")
    colours = {ADAPTER: "tab:blue", SELECTION: "tab:green", FULL: "tab:orange"}
    best = {name: one for name, one in best_of(results).items() if "error" not in one}
    shown = {"validation_loss": "perplexity of the new text", "forgetting_loss": "perplexity of the old text"}
    for panel, (key, title) in zip(panels, shown.items(), strict=True):
        points = []
        for name, one in best.items():
            cost = (one["gradient_bytes"] + one["optimizer_state_bytes"]) / 2**20
            value = math.exp(one[key])
            points.append((cost, value, name))
            panel.scatter(cost, value, color=colours[RUNS[name]["kind"]], s=22, zorder=3)
        front, lowest = [], math.inf
        for cost, value, _ in sorted(points):
            if value < lowest:
                front.append((cost, value))
                lowest = value
        panel.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=1, drawstyle="steps-post")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.set_xlabel("gradients and optimizer state, MiB")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.margins(x=0.1, y=0.06)
        label(panel, points)
    for kind, colour in colours.items():
        if any(RUNS[name]["kind"] == kind for name in best):
            panels[0].scatter([], [], color=colour, s=22, label=kind)
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="the new text")
    parser.add_argument("--validation", required=True, help="more of it, to evaluate on")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", default="9m", help="size of the base model")
    parser.add_argument(
        "--base", default="runs/finetune_base", help="folder of the base model, which is made if it is not there"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="of each run")
    given = parser.parse_args()
    file = RESULTS / "finetune.json"
    results: dict[str, Any] = {
        "model": given.model,
        "steps": given.steps,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    results["runs"] = []
    if file.exists() and (held := json.loads(file.read_text()))["steps"] == given.steps:
        results = held if held["model"] == given.model else results
    base = pretrained(Path(given.base), given.model, given.threads)
    given.texts = samples(given.validation, base / "texts")
    done = {(one["name"], one["rate"]) for one in results["runs"]}
    both = [(name, RUNS[name]["rates"][i]) for i in range(2) for name in given.runs]
    wanted = [which for which in both if which not in done]

    def one(which: tuple[str, float]) -> None:
        found = run(*which, given, base)
        with WRITING:
            results["runs"].append(found)
            file.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps(found), flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, wanted))
    (RESULTS / "finetune.md").write_text(table(results) + "\n")
    picture(results, RESULTS / "finetune.png")
    print(table(results))


if __name__ == "__main__":
    main()
