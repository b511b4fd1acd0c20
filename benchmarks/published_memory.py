"""The bytes of weights and optimizer state that papers print, beside what the planner counts.

    python benchmarks/published_memory.py

GaLore's table 2 (Zhao et al. 2024, arXiv:2403.03507) gives estimates in bf16, its table 3 the 7B model with moments in
8 bits. Nothing is allocated.
"""

from __future__ import annotations

from functools import partial

from gracile.train.config.parser import load_config
from gracile.train.measurement.planner import Planner

BF16 = '{"state_dtype": "bfloat16"}'
PUBLISHED = {
    "60m": {"adamw": 0.36, "galore_adamw": 0.24},
    "130m": {"adamw": 0.76, "galore_adamw": 0.52},
    "350m": {"adamw": 2.06, "galore_adamw": 1.22},
    "1b": {"adamw": 7.80, "galore_adamw": 4.38},
    "7b": {"galore_adamw_8bit": 18.0},
}


def counted(size: str, optimizer: str) -> int:
    """Bytes of weights and state with the recipe's own rank, vocabulary of 32,000 as in the paper."""
    keys = ["--optimizer", optimizer, "--dtype", "bfloat16", "--model_overrides", '{"vocab_size": 32000}']
    if optimizer == "galore_adamw":
        keys += ["--optimizer_args", BF16]
    load = partial(load_config, needs_output_dir=False)
    planner = Planner(load([f"llama_{size}_galore", *keys]))
    return planner.weights_and_state(optimizer)


def main() -> None:
    print("| model | optimizer | published, G | counted, GiB | counted, GB |\n|---|---|---|---|---|")
    for size, row in PUBLISHED.items():
        for optimizer, published in row.items():
            told = counted(size, optimizer)
            print(f"| {size} | {optimizer} | {published:.2f} | {told / 2**30:.2f} | {told / 1e9:.2f} |")


if __name__ == "__main__":
    main()
