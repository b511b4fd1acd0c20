"""What a step and a refresh cost, beside their floor and beside peers, in one run; medians.

    python benchmarks/optimizer_step.py --size 60m
    python benchmarks/optimizer_step.py --size 350m

1. A step between refreshes, on the matrices of one layer of a LLaMA size. The floor is what any such step must do:
   G P and N P^T with ``addmm``, and Adam on R. And whether equal-shaped matrices are faster as one stack.
2. A refresh, on gradients of a real run: a LLaMA of that size trains on this Python's standard library with AdamW;
   the subspace found at one step is refreshed at a later one, exactly (as galore-torch does) and by one warm
   iteration. Energy is what the new subspace holds of the gradient over what the exact one holds.

Contenders take turns, so that a drift of the machine's speed meets all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apollo_torch
import bitsandbytes
import galore_torch
import torch
from galore_torch.galore_projector import GaLoreProjector
from torch import nn

from gracile import optim
from gracile.models import SIZES, build_llama
from gracile.optim.distributed.projection import ProjectionSide
from gracile.optim.low_rank.singular import leading_singular_vectors, orthogonal_iteration
from gracile.train.config.arguments import DataArguments
from gracile.train.data.blocks import collate, make_blocks
from gracile.train.data.corpus import open_corpus
from gracile.train.data.tokenizer import get_tokenizer

RANKS = {"60m": 128, "350m": 256}  # of the GaLore paper's recipes
NEVER = 10**9


def medians(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of each contender, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def layer_shapes(size: str) -> list[tuple[int, int]]:
    h, f = SIZES[size]["hidden_size"], SIZES[size]["intermediate_size"]
    return [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]


def floor_step(shapes: list[tuple[int, int]], rank: int, gradients: list[torch.Tensor]) -> Callable[[], None]:
    frames = [ProjectionSide.of(shape, rank, "std") for shape in shapes]
    bases = [torch.linalg.qr(torch.randn(*frame.basis_shape)).Q for frame in frames]
    weights = [0.02 * torch.randn(shape) for shape in shapes]
    moments = [[torch.zeros(frame.projected_shape) for _ in range(2)] for frame in frames]

    def step() -> None:
        for W, G, P, (M, V), frame in zip(weights, gradients, bases, moments, frames, strict=True):
            R = G @ P if frame.right else P.t() @ G
            M.mul_(0.9).add_(R, alpha=0.1)
            V.mul_(0.999).addcmul_(R, R, value=0.001)
            N = V.sqrt().add_(1e-6)
            torch.div(M, N, out=N)
            W.addmm_(N, P.t(), alpha=-1e-5) if frame.right else W.addmm_(P, N, alpha=-1e-5)

    return step


def contenders(rank: int) -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """Ours and their peers, each on matrices alone; those that move their subspace at every step do so here too."""
    side = {"rank": rank, "proj_type": "std"}
    keys = {**side, "update_proj_gap": NEVER, "scale": 0.25}
    peer = {**keys, "proj": "random", "scale_type": "channel", "scale": 1.0}
    lr: Any = {"lr": 1e-5}
    return {
        "GaLoreAdamW": lambda ps: optim.GaLoreAdamW(ps, **lr, **keys),
        "galore-torch": lambda ps: galore_torch.GaLoreAdamW(
            [{"params": ps, **keys}], **lr, no_deprecation_warning=True
        ),
        "GaLoreAdamW8bit": lambda ps: optim.GaLoreAdamW8bit(ps, **lr, **keys),
        "GaLoreAdafactor": lambda ps: optim.GaLoreAdafactor(ps, **keys),
        "GaLoreLion": lambda ps: optim.GaLoreLion(ps, **lr, **keys),
        "GaLorePlusAdamW": lambda ps: optim.GaLorePlusAdamW(ps, **lr, **keys, residual_warmup=1),
        "FiraAdamW": lambda ps: optim.FiraAdamW(ps, **lr, **keys),
        "GradNormLoRPAdamW": lambda ps: optim.GradNormLoRPAdamW(ps, **lr, **keys),
        "APOLLOAdamW": lambda ps: optim.APOLLOAdamW(ps, **lr, **side, update_proj_gap=NEVER),
        "apollo-torch": lambda ps: apollo_torch.APOLLOAdamW([{"params": ps, **peer}], **lr),
        "DCTAdamW": lambda ps: optim.DCTAdamW(ps, **lr, **side),
        "LDAdamW": lambda ps: optim.LDAdamW(ps, **lr, **side),
        "Lion": lambda ps: optim.Lion(ps, **lr),
        "torch AdamW fused": lambda ps: torch.optim.AdamW(ps, **lr, fused=True),
        "bitsandbytes AdamW8bit": lambda ps: bitsandbytes.optim.AdamW8bit(ps, **lr),
    }


def between_refreshes(size: str, repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds of a step, and bytes of state."""
    shapes, rank = layer_shapes(size), RANKS[size]
    gradients = [torch.randn(shape) for shape in shapes]
    steps = {"floor": floor_step(shapes, rank, gradients)}
    held = {}
    for name, make in contenders(rank).items():
        parameters = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
        optimizer = make(parameters)
        for p, G in zip(parameters, gradients, strict=True):
            p.grad = G
        for _ in range(2):  # the first steps find the subspaces; the timed ones do not
            optimizer.step()
        steps[name], held[name] = optimizer.step, optim.state_bytes(optimizer)
    return medians(steps, repeats), held


def batched(shape: tuple[int, int], rank: int, count: int, repeats: int) -> dict[str, float]:
    """The same update of ``count`` matrices of one shape, one after the other and as one stack."""
    frame = ProjectionSide.of(shape, rank, "right")
    G, P = torch.randn(count, *shape), torch.randn(count, *frame.basis_shape)
    W, M, V = 0.02 * torch.randn(count, *shape), *(torch.zeros(2, count, *frame.projected_shape))

    def update(W, G, P, M, V):
        R = G @ P
        M.mul_(0.9).add_(R, alpha=0.1)
        V.mul_(0.999).addcmul_(R, R, value=0.001)
        N = V.sqrt().add_(1e-6)
        torch.div(M, N, out=N)
        W.add_(N @ P.mT, alpha=-1e-5)

    parts = [[*map(torch.clone, parts)] for parts in zip(W, G, P, M, V, strict=True)]  # each in memory of its own

    def stacked() -> None:  # gradients lie apart: a stack of them is part of the price
        gathered = torch.stack([part[1] for part in parts])
        update(W, gathered, P, M, V)

    return medians({"one by one": lambda: [update(*part) for part in parts], "stacked": stacked}, repeats)


def real_gradients(size: str, steps: tuple[int, int]) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Gradients of one layer's matrices at two steps of a real run: (name, earlier, later)."""
    data = DataArguments(block_size=128, validation_blocks=1)
    corpus = open_corpus(data)
    blocks = make_blocks(corpus, get_tokenizer(None, corpus, 4096), data).train.shuffle(seed=0)
    torch.manual_seed(0)
    model = build_llama(size, vocab_size=4096)
    layer = model.model.layers[len(model.model.layers) // 2]
    matrices = {name: m.weight for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    kept: dict[int, dict[str, torch.Tensor]] = {}
    for step in range(1, steps[1] + 1):
        batch = collate([blocks[8 * step + i] for i in range(8)])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if step in steps:
            kept[step] = {name: p.grad.clone() for name, p in matrices.items()}
        optimizer.step()
    return [(name, kept[steps[0]][name], kept[steps[1]][name]) for name in matrices]


def refreshes(size: str, repeats: int, steps: tuple[int, int]) -> list[dict[str, object]]:
    rows = []
    for name, earlier, later in real_gradients(size, steps):
        frame = ProjectionSide.of((later.shape[0], later.shape[1]), RANKS[size], "std")
        old = orthogonal_iteration(earlier, frame, None)
        found = {
            "galore-torch": lambda G=later, f=frame: GaLoreProjector(f.rank).get_orthogonal_matrix(
                G, f.rank, "right" if f.right else "left"
            ),
            "svd": lambda G=later, f=frame: leading_singular_vectors(G, f),
            "iterate": lambda G=later, f=frame, P=old: orthogonal_iteration(G, f, P),
        }
        times = medians(found, repeats)
        exact, warm = (energy(later, found[name](), frame) for name in ("svd", "iterate"))
        shape = f"{later.shape[0]} x {later.shape[1]}"
        rows.append({"matrix": name, "shape": shape, **times, "energy": warm / exact})
    return rows


def energy(G: torch.Tensor, P: torch.Tensor, frame: ProjectionSide) -> float:
    return float(torch.linalg.vector_norm((G @ P if frame.right else P.t() @ G).double()) ** 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(RANKS), default="60m")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, nargs=2, default=(5, 15), help="of the run whose gradients are taken")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rank = RANKS[options.size]

    between, held = between_refreshes(options.size, options.repeats)
    print(f"a step between refreshes, one layer of {options.size}, rank {rank}")
    for name, milliseconds in between.items():
        size = f"{held[name] / 2**20:8.1f} MiB" if name in held else ""
        print(f"  {name:<24}{milliseconds:8.1f} ms   {milliseconds / between['floor']:6.2f} of the floor{size}")
    stacks = {}
    for shape, r, count in (((128, 128), 32, 16), ((512, 512), 128, 32)):
        stacks[f"{count} of {shape[0]} x {shape[1]}, rank {r}"] = times = batched(shape, r, count, options.repeats)
        print(
            f"  {count} matrices of {shape[0]} x {shape[1]}: {times['stacked'] / times['one by one']:.2f} when stacked"
        )

    rows = refreshes(options.size, max(1, options.repeats // 3), tuple(options.steps))
    print(f"a refresh at step {options.steps[1]} of a real run, warm from step {options.steps[0]}")
    for row in rows:
        ratio = row["galore-torch"] / row["iterate"]
        print(
            f"  {row['matrix']:<20}{row['shape']:<14}galore-torch {row['galore-torch']:8.1f} ms   "
            f"svd {row['svd']:8.1f} ms   iterate {row['iterate']:7.1f} ms"
            f"   1/{ratio:.1f}   energy {row['energy']:.4f}"
        )
    total = sum(row["galore-torch"] for row in rows) / sum(row["iterate"] for row in rows)
    print(
        f"  all together: 1/{total:.1f} of galore-torch's refresh, energy at least {min(r['energy'] for r in rows):.4f}"
    )

    options.output.mkdir(parents=True, exist_ok=True)
    told = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rank": rank,
        "steps": list(options.steps),
        "between_refreshes_ms": between,
        "state_bytes": held,
        "stacked_ms": stacks,
        "refreshes": rows,
    }
    (options.output / f"optimizer_step_{options.size}.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
