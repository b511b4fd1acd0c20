"""Kernels that a step launches on a GPU, and where it waits for one, by a pretended device: no GPU is needed.

python benchmarks/launches.py            # every class, at the matrices of a LLaMA-1B
python benchmarks/launches.py GaLore     # those with this in their name

Every side of LLaMA-1B's matrices and the rank is about a 64th of what it is, and every limit by which work is cut a
64th of a 64th: as many launches as at full size. Masks leave a fifth of the weights.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from catalogue import VARIANTS, Variant
from pretend_device import on_device, pretend

from gracile.models.convert import convert
from gracile.optim import ReLoRAAdamW, SLTrainAdamW, SLTrainAdamW8bit, SSTAdamW
from gracile.optim.core import batches
from gracile.optim.core.optimizer import ShardedOptimizer
from gracile.optim.distributed import blocked, pieces
from gracile.optim.low_rank import optimizer as low_rank
from gracile.optim.sparse import lots, top_k
from gracile.optim.state import blockwise_8bit
from gracile.optim.state.spec import PLAIN

Made = tuple[list[nn.Parameter], torch.optim.Optimizer]

SMALLER = 64
LAYERS = 24
# 5461 / 64; what heads and patterns divide; and of which coordinates are whole blocks of 256, as they are at full size
LONG, DIVISIBLE, IN_BLOCKS = 85, 88, 96
OTHERS = [(500, 32), (500, 32), *[(32,)] * (2 * LAYERS + 1)]
LIMITS = [
    *((batches, limit) for limit in ("AT_ONCE", "MATRICES_AT_ONCE", "MANY_BELOW", "FEW_BELOW")),
    (low_rank, "FOUND_AT_ONCE"),
    *((blocked, limit) for limit in ("BLOCK", "LARGE", "LARGE_TWICE")),
    (blockwise_8bit, "SMALLEST"),
    (lots, "IN_A_LOT"),
    (pieces, "ELSEWHERE"),
    (top_k, "ON_A_GPU"),
]
RANK = 512 // SMALLER
SPARSITY = 0.8
STEPS = 6  # refreshes and changes of masks after 0 and 4


def counted(variant: Variant) -> tuple[list[int], list[int]]:
    """Launches and waits of each step."""
    torch.manual_seed(0)
    launches, waits = [], []
    with pretend() as record:
        held, optimizer = made_of_matrices(variant) if variant.quadratic else made_of_layers(variant)
        for _ in range(STEPS):
            for p in held:
                p.grad = on_device(torch.randn(p.shape))
            record.clear()
            optimizer.step()
            launches.append(record.launches)
            waits.append(record.waits.total() + record.copies.total())
    return launches, waits


def made_of_matrices(variant: Variant) -> Made:
    use = variant.quadratic
    assert use is not None
    own = dict(use.matrices or {})
    own |= {"rank": RANK} if own.get("rank", 1) > 1 else {}
    own |= {"sparsity": SPARSITY} if "sparsity" in own else {}
    shapes = matrix_shapes(own, variant.cls) * LAYERS
    matrices = [nn.Parameter(on_device(0.1 * torch.randn(shape))) for shape in shapes]
    others = made_others()
    return matrices + others, variant.cls([{"params": matrices, **own}, {"params": others}], **use.keys)


def made_of_layers(variant: Variant) -> Made:
    """With a change of the layers after every fourth step."""
    assert variant.layer is not None
    assert variant.cells is not None
    kind, keys, _ = variant.layer
    model = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in matrix_shapes({}, variant.cls) * LAYERS))
    convert(model, kind, [str(number) for number in range(len(model))], rank=RANK, **keys)
    for layer in model:
        for tensors in (layer._parameters, layer._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there = on_device(tensor)
                    trained = tensors is layer._parameters
                    tensors[name] = nn.Parameter(there, requires_grad=tensor.requires_grad) if trained else there
    held = [p for p in model.parameters() if p.requires_grad] + made_others()
    keys = {key: 4 if key in ("swap_every", "merge_every") else value for key, value in variant.cells.keys.items()}
    return held, variant.cls(held, **keys)


def matrix_shapes(keys: Mapping[str, object], kind: type[ShardedOptimizer]) -> list[tuple[int, int]]:
    long = DIVISIBLE if keys.keys() & {"n", "num_heads"} else LONG if kind.moment_codec is PLAIN else IN_BLOCKS
    return [(32, 32)] * 4 + [(long, 32)] * 2 + [(32, long)]


def made_others() -> list[nn.Parameter]:
    return [nn.Parameter(on_device(0.1 * torch.randn(shape))) for shape in OTHERS]


def main() -> None:
    warnings.simplefilter("ignore")
    for module, limit in LIMITS:
        setattr(module, limit, getattr(module, limit) // SMALLER**2)
    print("| class | an ordinary step | waits | the busiest after the first | waits |\n|---|---|---|---|---|")
    for name, variant in VARIANTS.items():
        of_layers = variant.cls in (ReLoRAAdamW, SLTrainAdamW, SLTrainAdamW8bit, SSTAdamW)
        if not (variant.quadratic or of_layers) or not any(word in name for word in sys.argv[1:] or [""]):
            continue
        launches, waits = counted(variant)
        print(
            f"| {name} | {min(launches[1:])} | {min(waits[1:])} | {max(launches[1:])} | {max(waits[1:])} |", flush=True
        )


if __name__ == "__main__":
    main()
