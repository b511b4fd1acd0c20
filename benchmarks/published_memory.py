"""The bytes of weights and optimizer state that papers print, beside what the planner counts for their recipes.

    python benchmarks/published_memory.py

GaLore's table 2 (Zhao et al. 2024, arXiv:2403.03507) gives estimates in bf16, its table 3 the 7B model with moments in
8 bits. APOLLO's table 2 (Zhu et al. 2024, arXiv:2412.05270) adds Fira, APOLLO with half of GaLore's rank, and
APOLLO-Mini; its figure for APOLLO at 1B is of GaLore's rank. Nothing is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from gracile.train.config.parser import load_config
from gracile.train.measurement.planner import Planner

RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}  # GaLore's
HALF, MINI = "apollo_adamw, half the rank", "apollo_adamw, Mini"
# The recipe of each row, and its share of GaLore's rank, where that is not the recipe's own.
ROWS = {
    "adamw": ("adamw", None),
    "galore_adamw": ("galore", None),
    "galore_adamw_8bit": ("galore", None),
    "fira_adamw": ("fira", None),
    "apollo_adamw": ("apollo", 1.0),
    HALF: ("apollo", 0.5),
    MINI: ("apollo_mini", None),
}
PUBLISHED = {
    "60m": {"adamw": 0.36, "galore_adamw": 0.24, "fira_adamw": 0.24, HALF: 0.18, MINI: 0.12},
    "130m": {"adamw": 0.76, "galore_adamw": 0.52, "fira_adamw": 0.52, HALF: 0.39, MINI: 0.25},
    "350m": {"adamw": 2.06, "galore_adamw": 1.22, "fira_adamw": 1.22, HALF: 0.95, MINI: 0.69},
    "1b": {"adamw": 7.80, "galore_adamw": 4.38, "fira_adamw": 4.38, "apollo_adamw": 4.38, HALF: 3.49, MINI: 2.60},
    "7b": {"galore_adamw_8bit": 18.0},
}


def planner_of(size: str, row: str) -> Planner:
    """Of the recipe, with moments in bf16 or 8 bits and a vocabulary of 32,000, as in the papers."""
    recipe, share = ROWS[row]
    load = partial(load_config, needs_output_dir=False)
    name, more = f"llama_{size}_{recipe}", ["--model_overrides", '{"vocab_size": 32000}']
    if row == "galore_adamw_8bit":
        more += ["--optimizer", row]
    elif row != "adamw":
        own = load([name]).optimizer.optimizer_args or {}
        more += ["--optimizer_args", json.dumps({**own, "state_dtype": "bfloat16"})]
    if share is not None:
        more += ["--rank", str(round(share * RANKS[size]))]
    return Planner(load([name, *more]))


def counted() -> Iterator[tuple[str, str, float, int]]:
    """Model, row, the published figure, and the bytes of weights and state."""
    for size, published in PUBLISHED.items():
        for row, figure in published.items():
            yield size, row, figure, planner_of(size, row).weights_and_state(row.split(",")[0])


def main() -> None:
    print("| model | optimizer | published, G | counted, GiB | counted, GB |\n|---|---|---|---|---|")
    for size, row, figure, told in counted():
        print(f"| {size} | {row} | {figure:.2f} | {told / 2**30:.2f} | {told / 1e9:.2f} |")


if __name__ == "__main__":
    main()
