"""Whether LoRA brings intruder dimensions where full fine-tuning brings none (arXiv:2410.21228), on a small model.

    python benchmarks/spectra.py --train valid.txt --validation test.txt    # results/spectra.json, .md and pictures

The 2M LLaMA of ``gracile pretrain quickstart``, trained on the standard library for ``--base_steps``, is fine-tuned on
another text: by LoRA of rank 8 for ``--steps``, then by the other contenders until they have its validation loss. All
move the matrices of the blocks alone. ``gracile spectra`` then compares each with the base.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gracile.train.spectra import as_json, find
from gracile.train.spectra_figure import draw
from gracile.train.spectra_rows import layer_names

RESULTS = Path(__file__).parent / "results"
BLOCK, BATCH, EVERY = 128, 16, 10
KEYS = {"k": 10, "epsilon": 0.5, "subspace": 64, "modules": None, "embeddings": False, "device": "cpu"}


class Contender(NamedTuple):
    """rank: of LoRA; 0 for the matrices themselves."""

    rank: int
    rate: float
    rslora: bool = False


CONTENDERS = {
    "LoRA, rank 8": Contender(8, 5e-3),
    "full": Contender(0, 1e-3),
    "rsLoRA, rank 64": Contender(64, 1e-3, rslora=True),
}
COLUMNS = {
    "intruders": ("intruders", ".2f"),
    "control": ("control", ".2f"),
    "their energy": ("intruder_energy", ".3f"),
    "drift": ("drift", ".4f"),
    "angle, mean": ("left_angle_mean", ".1f"),
    "effective rank": ("effective_rank", ".1f"),
    "\\|D\\|/\\|W\\|": ("relative_norm", ".3f"),
    "same in bf16": ("unchanged", ".3f"),
}


def blocks(tokenizer: Any, path: Path) -> torch.Tensor:
    """The text as rows of tokens."""
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"))["input_ids"])
    return ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)


def batches(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from (rows[part] for part in torch.randperm(len(rows), generator=generator).split(BATCH))


@torch.no_grad()
def loss_of(model: Any, rows: torch.Tensor) -> float:
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) for part in rows.split(BATCH)]
    model.train()
    return math.fsum(losses) / len(losses)


def made(base: Path, contender: Contender) -> Any:
    """The model to train: everything but the matrices of its blocks, or their factors, is frozen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    if contender.rank:
        config = LoraConfig(
            r=contender.rank,
            lora_alpha=2 * contender.rank if not contender.rslora else 16,
            use_rslora=contender.rslora,
            target_modules="all-linear",
        )
        return get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.ndim == 2 and ".layers." in name)
    return model


def tune(
    base: Path, contender: Contender, data: Namespace, steps: int, target: float | None
) -> tuple[Any, dict[str, Any]]:
    """Train for ``steps``, or until the validation loss is at most ``target``."""
    model = made(base, contender)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], contender.rate, weight_decay=0)
    rows, loss, step = batches(data.train), math.nan, 0
    for step in range(1, steps + 1):
        part = next(rows)
        for group in optimizer.param_groups:
            group["lr"] = contender.rate * min(1.0, step / 10)
        model(input_ids=part, labels=part).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            print(f"  step {step}", flush=True)
        if step == steps or (target is not None and step % EVERY == 0):
            loss = loss_of(model, data.validation)
            print(f"  step {step} validation loss {loss:.4f}", flush=True)
            if target is not None and loss <= target:
                break
    return model, {**contender._asdict(), "steps": step, "validation_loss": loss}


def table(runs: dict[str, dict[str, Any]], before: float) -> str:
    lines = [
        f"| | learning rate | steps | validation loss | {' | '.join(COLUMNS)} |",
        "|---" * (4 + len(COLUMNS)) + "|",
    ]
    lines.append(f"| base | | | {before:.4f} |" + " |" * len(COLUMNS))
    for name, run in runs.items():
        cells = " | ".join(f"{run['all'][key]:{form}}" for key, form in COLUMNS.values())
        lines.append(f"| {name} | {run['rate']:g} | {run['steps']} | {run['validation_loss']:.4f} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, metavar="FILE.txt")
    parser.add_argument("--validation", type=Path, required=True, metavar="FILE.txt")
    parser.add_argument("--base", type=Path, help="a quickstart that is trained already")
    parser.add_argument("--base_steps", type=int, default=900)
    parser.add_argument(
        "--steps", type=int, default=60, help="of LoRA of rank 8; the others have thrice as many at most"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = options.base or Path(scratch) / "base"
        if options.base is None:
            flags = ["--max_steps", str(options.base_steps), "--output_dir", str(base)]
            subprocess.run([sys.executable, "-m", "gracile.train.pretrain", "quickstart", *flags], check=True)
        tokenizer = AutoTokenizer.from_pretrained(base)
        train, validation = blocks(tokenizer, options.train), blocks(tokenizer, options.validation)[: 8 * BATCH]
        data, target = Namespace(train=train, validation=validation), None
        before = loss_of(AutoModelForCausalLM.from_pretrained(base), data.validation)
        runs: dict[str, dict[str, Any]] = {}
        for name, contender in CONTENDERS.items():
            print(name, flush=True)
            model, told = tune(base, contender, data, options.steps * (1 if target is None else 3), target)
            target = told["validation_loss"] if target is None else target
            folder = Path(scratch) / name.replace(", ", "_").replace(" ", "_")
            model.save_pretrained(folder)
            keys = Namespace(base=base, tuned=folder, **KEYS)
            found = list(find(keys))
            runs[name] = {**told, **{key: as_json(found, keys)[key] for key in ("all", "by_layer", "by_kind")}}
            draw(RESULTS / f"spectra_{folder.name.lower()}.png", found, layer_names(found), KEYS["epsilon"])
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            report = {
                "base": {"steps": options.base_steps, "validation_loss": before},
                "runs": runs,
                "versions": versions,
            }
            (RESULTS / "spectra.json").write_text(json.dumps(report, indent=1) + "\n")
            (RESULTS / "spectra.md").write_text(table(runs, before))
    print(table(runs, before))


if __name__ == "__main__":
    main()
