"""The layouts of a run that suffers, its configuration, and what the undisturbed run has found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import yaml
from helpers import weights
from launched import CONFIGS

SAVE_STEPS, KEPT = 4, 3
SETTINGS = {
    "model": "2m",
    "model_overrides": {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 400, "attention_dropout": 0.1,  # so that the random state decides each step
    },
    "block_size": 32, "validation_blocks": 16, "rank": 8, "update_proj_gap": 10, "learning_rate": 0.01,
    "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 10, "logging_steps": 3,
    "save_steps": SAVE_STEPS, "save_total_limit": KEPT, "disable_tqdm": True, "output_dir": "unset",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    name: str
    ranks: int
    launcher: str | None = None  # as ``launched`` calls it

    @property
    def engine(self) -> list[str]:
        return ["--deepspeed", str(CONFIGS / f"{self.name}.json")] if self.name.startswith("zero") else []


LAYOUTS = (Layout("one", 1), Layout("ddp", 2, "torchrun"), Layout("zero2", 2, "zero2"), Layout("zero3", 2, "zero3"))


def write_config(folder: Path, steps: int) -> Path:
    """A run on the text of a Python module."""
    text = Path(util.find_spec("argparse").origin).read_text(encoding="utf-8")
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "dataset": str(folder / "corpus.txt"), "max_steps": steps}))
    return path


def found_by(run: Path) -> dict[str, Any]:
    """What two runs are compared by."""
    told = json.loads((run / "metrics.json").read_text())
    return {"losses": told["history"], "validation loss": told["validation_loss"], "weights": weights(run)}
