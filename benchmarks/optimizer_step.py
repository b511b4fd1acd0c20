"""What a step and a refresh cost, beside their floor and beside peers, in one run; medians.

    python benchmarks/optimizer_step.py --size 60m
    python benchmarks/optimizer_step.py --size 350m

1. A step between refreshes, on the matrices of one layer of a LLaMA size. The floor is what any such step must do:
   G P and N P^T with ``addmm``, and Adam on R.
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

import galore_torch
import torch
from torch import nn

from gracile.models import SIZES, build_llama
from gracile.optim import FiraAdamW, GaLoreAdamW
from gracile.optim.subspaces.basis import Frame
from gracile.optim.subspaces.singular import leading_singular_vectors, orthogonal_iteration
from gracile.train.config import DataArguments
from gracile.train.data import collate, make_blocks, open_corpus
from gracile.train.tokenizer import get_tokenizer

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
    frames = [Frame.of(shape, rank, "std") for shape in shapes]
    bases = [torch.linalg.qr(torch.randn(*frame.basis_shape)).Q for frame in frames]
    weights = [torch.randn(shape) for shape in shapes]
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


def stepping(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], gradients: list[torch.Tensor]):
    parameters = [nn.Parameter(torch.randn(G.shape)) for G in gradients]
    optimizer = make(parameters)
    for p, G in zip(parameters, gradients, strict=True):
        p.grad = G
    optimizer.step()  # the first step finds the subspaces; the timed ones do not
    return optimizer.step


def between_refreshes(size: str, repeats: int) -> dict[str, float]:
    shapes, rank = layer_shapes(size), RANKS[size]
    gradients = [torch.randn(shape) for shape in shapes]
    keys = {"rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}
    contenders = {
        "floor": floor_step(shapes, rank, gradients),
        "GaLoreAdamW": stepping(lambda ps: GaLoreAdamW(ps, lr=1e-5, **keys), gradients),
        "galore-torch": stepping(
            lambda ps: galore_torch.GaLoreAdamW([{"params": ps, **keys}], lr=1e-5, no_deprecation_warning=True),
            gradients,
        ),
        "FiraAdamW": stepping(lambda ps: FiraAdamW(ps, lr=1e-5, **keys), gradients),
        "torch AdamW fused": stepping(lambda ps: torch.optim.AdamW(ps, lr=1e-5, fused=True), gradients),
    }
    return medians(contenders, repeats)


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
        frame = Frame.of((later.shape[0], later.shape[1]), RANKS[size], "std")
        old = orthogonal_iteration(earlier, frame, None)
        found = {
            "svd": lambda G=later, f=frame: leading_singular_vectors(G, f),
            "iterate": lambda G=later, f=frame, P=old: orthogonal_iteration(G, f, P),
        }
        times = medians(found, repeats)
        exact, warm = (energy(later, find(), frame) for find in found.values())
        shape = f"{later.shape[0]} x {later.shape[1]}"
        rows.append({"matrix": name, "shape": shape, **times, "energy": warm / exact})
    return rows


def energy(G: torch.Tensor, P: torch.Tensor, frame: Frame) -> float:
    return float(torch.linalg.vector_norm((G @ P if frame.right else P.t() @ G).double()) ** 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(RANKS), default="60m")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, nargs=2, default=(5, 15), help="of the run whose gradients are taken")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rank = RANKS[options.size]

    between = between_refreshes(options.size, options.repeats)
    print(f"a step between refreshes, one layer of {options.size}, rank {rank}")
    for name, milliseconds in between.items():
        print(f"  {name:<20}{milliseconds:8.1f} ms   {milliseconds / between['floor']:5.2f} of the floor")

    rows = refreshes(options.size, max(1, options.repeats // 3), tuple(options.steps))
    print(f"a refresh at step {options.steps[1]} of a real run, warm from step {options.steps[0]}")
    for row in rows:
        ratio = row["svd"] / row["iterate"]
        print(
            f"  {row['matrix']:<20}{row['shape']:<14}svd {row['svd']:8.1f} ms   iterate {row['iterate']:7.1f} ms"
            f"   1/{ratio:.1f}   energy {row['energy']:.4f}"
        )
    total = sum(row["svd"] for row in rows) / sum(row["iterate"] for row in rows)
    print(f"  all together: 1/{total:.1f} of the exact refresh, energy at least {min(r['energy'] for r in rows):.4f}")

    options.output.mkdir(parents=True, exist_ok=True)
    told = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rank": rank,
        "steps": list(options.steps),
        "between_refreshes_ms": between,
        "refreshes": rows,
    }
    (options.output / f"optimizer_step_{options.size}.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
