"""Kernels that a step launches on a GPU, and where it waits for one, by a pretended device: no GPU is needed.

python benchmarks/launches.py            # every class, at the matrices of a LLaMA-1B
python benchmarks/launches.py GaLore     # those with this in their name

Every side of LLaMA-1B's matrices and the rank is about a 64th of what it is, and every limit by which work is cut a
64th of a 64th: as many launches as at full size.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from catalogue import VARIANTS, Variant
from pretend_device import on_device, pretend

from gracile.optim.core import batches
from gracile.optim.distributed import pieces
from gracile.optim.low_rank import optimizer as low_rank
from gracile.optim.sparse import top_k

SMALLER = 64
LAYERS = 24
LONG, DIVISIBLE = 85, 88  # 5461 / 64, and what heads and patterns divide
OTHERS = [(500, 32), (500, 32), *[(32,)] * (2 * LAYERS + 1)]
LIMITS = [
    *((batches, limit) for limit in ("AT_ONCE", "MATRICES_AT_ONCE", "MANY_BELOW", "FEW_BELOW")),
    (low_rank, "FOUND_AT_ONCE"),
    (pieces, "ELSEWHERE"),
    (top_k, "ON_A_GPU"),
]
STEPS = 6  # refreshes and changes of masks after 0 and 4


def counted(variant: Variant) -> tuple[list[int], list[int]]:
    """Launches and waits of each step."""
    use = variant.quadratic
    assert use is not None
    own = dict(use.matrices or {})
    own |= {"rank": 512 // SMALLER} if own.get("rank", 1) > 1 else {}
    long = DIVISIBLE if own.keys() & {"n", "num_heads"} else LONG
    shapes = [(32, 32)] * 4 + [(long, 32)] * 2 + [(32, long)]
    generator = torch.Generator().manual_seed(0)
    launches, waits = [], []
    with pretend() as record:
        held = [
            nn.Parameter(on_device(0.1 * torch.randn(shape, generator=generator))) for shape in shapes * LAYERS + OTHERS
        ]
        matrices, others = held[: LAYERS * len(shapes)], held[LAYERS * len(shapes) :]
        optimizer = variant.cls([{"params": matrices, **own}, {"params": others}], **use.keys)
        for _ in range(STEPS):
            for p in held:
                p.grad = on_device(torch.randn(p.shape, generator=generator))
            record.clear()
            optimizer.step()
            launches.append(record.launches)
            waits.append(record.waits.total() + record.copies.total())
    return launches, waits


def main() -> None:
    warnings.simplefilter("ignore")
    for module, limit in LIMITS:
        setattr(module, limit, getattr(module, limit) // SMALLER**2)
    print("| class | an ordinary step | waits | the busiest after the first | waits |\n|---|---|---|---|---|")
    for name, variant in VARIANTS.items():
        if variant.quadratic is None or not any(word in name for word in sys.argv[1:] or [""]):
            continue
        launches, waits = counted(variant)
        print(
            f"| {name} | {min(launches[1:])} | {min(waits[1:])} | {max(launches[1:])} | {max(waits[1:])} |", flush=True
        )


if __name__ == "__main__":
    main()
