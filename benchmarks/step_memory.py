"""What a step of each optimizer needs for a moment, at the matrices of a layer of LLaMA-7B, planned for a GPU; MiB.

    python benchmarks/step_memory.py

In fp32, in bf16, and in bf16 with stochastic rounding; ranks 1024. A matrix of 4096 x 11008 in fp32 is 172 MiB. On an
H100 such plans were within 2 MiB of the allocator (gpu_check.py).
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from catalogue import VARIANTS, Variant

from gracile.train.measurement.fake_step import step_bytes

H, F, RANK = 4096, 11008, 1024
SHAPES = [(H, H)] * 4 + [(F, H)] * 2 + [(H, F)]
NAMES = (
    "GaLoreAdamW iterate",
    "GaLoreAdamW8bit",
    "GaLoreAdamW8bit Q-GaLore",
    "GaLoreAdafactor",
    "FiraAdamW",
    "GaLorePlusAdamW",
    "GradNormLoRPAdamW",
    "DCTAdamW",
    "DCTAdamW fed back",
    "APOLLOAdamW",
    "APOLLOAdamW Mini",
    "LDAdamW",
    "SCALE",
    "SRSTEAdamW",
    "CastAdamS",
    "HyperSparseAdamW",
    "WGSEFAdamW",
    "RigLAdamW",
    "Lion",
)


def planned(variant: Variant, dtype: torch.dtype, by_chance: bool) -> float:
    use = variant.quadratic
    assert use is not None
    keys = dict(use.matrices or {})
    if keys.get("rank", 1) > 1:
        keys["rank"] = RANK
    held = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape in SHAPES]
    return step_bytes(variant.cls([{"params": held, **keys}], **use.keys, stochastic_rounding=by_chance)) / 2**20


def main() -> None:
    warnings.simplefilter("ignore")
    print("| optimizer | fp32 | bf16 | bf16, by chance |\n|---|---|---|---|")
    for name in NAMES:
        forms = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
        row = [f"{planned(VARIANTS[name], dtype, by_chance):.0f}" for dtype, by_chance in forms]
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
