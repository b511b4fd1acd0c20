"""What layers that store less cost beside ``nn.Linear``, side by side in one run; medians.

    python benchmarks/layers.py --size 60m
    python benchmarks/layers.py --size 350m
    python benchmarks/layers.py --size 350m --one_thread        # on a machine that others use

1. Forward and backward of the seven matrices of one layer of a LLaMA size, the input's gradient included, in fp32.
   SLTrain and SST also in the other way that their products can be taken, which gives the same numbers: SLTrain as
   x A^T B^T plus a sparse matrix (CSR), values' gradients sampled at their places; SST as one dense W with its dense
   gradient, projected.
2. SST's re-SVDs and swaps at their default clocks, as a share of the run: of a step of these matrices alone.

Contenders take turns, so that a drift of the machine's speed meets all of them. ``--one_thread`` takes one thread, and
the time that it had a core: the turns of other processes are not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.models import SIZES
from gracile.models.layers import LowRankLinear, ReLoRALinear, SparseLowRankLinear, SpectralLinear

RANKS = {"60m": 128, "350m": 256}  # of SLTrain's recipes, and of the GaLore paper's low-rank rows
SST_RANK, SWAP_EVERY = 64, 200
FLOOR = "nn.Linear"
Shape = tuple[int, int]


class SparseProduct(torch.autograd.Function):
    """y = s x A^T B^T + x S^T, and no m x n tensor at any time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, values: Tensor, support: Tensor, scale: float
    ) -> Tensor:  # x: N x n; y: N x m
        H = x @ A.mT
        ctx.save_for_backward(x, H, A, B, values, support)
        ctx.scale = scale
        S = rows_of(support, values, len(B), A.shape[1])
        return torch.addmm((S @ x.mT).mT, H, B.mT, alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, H, A, B, values, support = ctx.saved_tensors
        S = rows_of(support, values, len(B), A.shape[1])
        C = dy @ B
        dx = torch.addmm((S.mT.to_sparse_csr() @ dy.mT).mT, C, A, alpha=ctx.scale)
        dvalues = torch.sparse.sampled_addmm(S, dy.mT, x, beta=0.0).values()
        return dx, (C.mT @ x).mul_(ctx.scale), (dy.mT @ H).mul_(ctx.scale), dvalues, None, None


def rows_of(support: Tensor, values: Tensor, m: int, n: int) -> Tensor:
    """The m x n matrix in CSR with ``values`` at ascending places."""
    starts = torch.searchsorted(support, n * torch.arange(m + 1, dtype=torch.int32), out_int32=True)
    return torch.sparse_csr_tensor(starts, support % n, values, (m, n), check_invariants=False)


class SparseProductLinear(SparseLowRankLinear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = SparseProduct.apply(x, self.A, self.B, self.values, self.support, self.scale)
        return y


class MergedSpectral(torch.autograd.Function):
    """y = x W^T with W = U diag(sigma) V^T; gradients are projections of G = dy^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, U_frozen: Tensor, V: Tensor, V_frozen: Tensor, sigma: Tensor) -> Tensor:
        ctx.save_for_backward(x, U, U_frozen, V, V_frozen, sigma)
        return F.linear(x, torch.cat([U, U_frozen], 1).mul_(sigma) @ torch.cat([V, V_frozen], 1).mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, U_active, U_frozen, V_active, V_frozen, sigma = ctx.saved_tensors
        U, V = torch.cat([U_active, U_frozen], 1), torch.cat([V_active, V_frozen], 1)
        r, G = U_active.shape[1], dy.mT @ x
        if len(G) < G.shape[1]:  # all columns on the side where they are shorter
            long = G @ V
            dU, dV, dsigma = long[:, :r].clone(), G.mT @ U_active, long.mul_(U).sum(0)
        else:
            long = G.mT @ U
            dU, dV, dsigma = G @ V_active, long[:, :r].clone(), long.mul_(V).sum(0)
        return dy @ (U.mul_(sigma) @ V.mT), dU, None, dV, None, dsigma


class MergedSpectralLinear(SpectralLinear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = MergedSpectral.apply(x, self.U, self.U_frozen, self.V, self.V_frozen, self.sigma)
        return y


def contenders(shape: Shape, rank: int) -> dict[str, nn.Module]:
    m, n = shape
    layers: dict[str, nn.Module] = {
        FLOOR: nn.Linear(n, m, bias=False),
        "LowRankLinear": LowRankLinear(n, m, False, rank=rank),
        "ReLoRALinear": ReLoRALinear(n, m, False, rank=rank),
        "SparseLowRankLinear": SparseLowRankLinear(n, m, False, rank=rank),
        "  x A^T B^T + sparse": SparseProductLinear(n, m, False, rank=rank),
        "SpectralLinear": SpectralLinear(n, m, False, rank=SST_RANK),
        "  merged W and G": MergedSpectralLinear(n, m, False, rank=SST_RANK),
    }
    for layer in layers.values():
        if hasattr(layer, "B"):
            nn.init.normal_(layer.B, std=0.02)  # else zero: not as a run has it
    for one, other in (("SparseLowRankLinear", "  x A^T B^T + sparse"), ("SpectralLinear", "  merged W and G")):
        layers[other].load_state_dict(layers[one].state_dict())
    return layers


def passes(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: the output, and the gradients of the input and of what is trained."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run() -> tuple[Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, wanted, dy)

    return run


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        error = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)
        if not error < 1e-5:
            raise AssertionError(f"two ways differ by {error:.1e}")


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of each contender, taking turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:  # the first turn warms up
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def layer_shapes(size: str) -> dict[Shape, int]:
    """How often each shape (out, in) is in one layer."""
    h, f = SIZES[size]["hidden_size"], SIZES[size]["intermediate_size"]
    return {(h, h): 4, (f, h): 2, (h, f): 1}


def one_shape(shape: Shape, rank: int, tokens: int, repeats: int) -> dict[str, float]:
    x, dy = torch.randn(tokens, shape[1], requires_grad=True), torch.randn(tokens, shape[0])
    runs = {name: passes(layer, x, dy) for name, layer in contenders(shape, rank).items()}
    assert_same(runs["SparseLowRankLinear"](), runs["  x A^T B^T + sparse"]())
    assert_same(runs["SpectralLinear"](), runs["  merged W and G"]())
    return medians(runs, repeats)


def summed(times: dict[Shape, dict[str, float]], counts: dict[Shape, int]) -> dict[str, float]:
    """Of one layer's matrices together."""
    names = next(iter(times.values()))
    return {name: sum(counts[shape] * times[shape][name] for shape in counts) for name in names}


def upkeep(shape: Shape, repeats: int) -> dict[str, float]:
    """Milliseconds of a re-SVD and of a swap."""
    layer = SpectralLinear(shape[1], shape[0], False, rank=SST_RANK)

    def swap() -> None:
        layer.swap(torch.multinomial(layer.probabilities(), SST_RANK))

    return medians({"refactor": layer.refactor, "swap": swap}, repeats)


def shares(costs: dict[Shape, dict[str, float]], counts: dict[Shape, int], step: float) -> dict[str, float]:
    """Of the time of steps of ``step`` milliseconds, at the default clocks."""
    every = {shape: SWAP_EVERY * math.ceil(min(shape) / SST_RANK) for shape in counts}
    refactors = sum(count * costs[shape]["refactor"] / every[shape] for shape, count in counts.items())
    swaps = sum(count * costs[shape]["swap"] / SWAP_EVERY for shape, count in counts.items())
    return {"refactor": refactors / step, "swap": swaps / step}


def table(times: dict[Shape, dict[str, float]], layer: dict[str, float]) -> None:
    print(f"  {'':<24}" + "".join(f"{f'{m} x {n}':>22}" for m, n in times) + f"{'one layer':>22}")
    for name in layer:
        columns = [*times.values(), layer]
        cells = (f"{column[name]:11.1f} ms {column[name] / column[FLOOR]:7.2f}" for column in columns)
        print(f"  {name:<24}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(RANKS), default="60m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 256])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--one_thread", "--one-thread", action="store_true", help="and its own time only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.manual_seed(0)
    if options.one_thread:
        torch.set_num_threads(1)
    rank, counts = RANKS[options.size], layer_shapes(options.size)

    costs = {shape: upkeep(shape, max(1, options.repeats // 3)) for shape in counts}
    told: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "ranks": {"SST": SST_RANK, "others": rank},
        "upkeep_ms": {f"{m} x {n}": cost for (m, n), cost in costs.items()},
        "tokens": {},
    }
    for tokens in options.tokens:
        times = {shape: one_shape(shape, rank, tokens, options.repeats) for shape in counts}
        layer = summed(times, counts)
        share = shares(costs, counts, layer["SpectralLinear"])
        print(f"{options.size}, {tokens} tokens, rank {rank}, SST's {SST_RANK}: forward and backward, of {FLOOR}'s")
        table(times, layer)
        print(f"  SST's re-SVDs {100 * share['refactor']:.3f} %, swaps {100 * share['swap']:.3f} % of such steps")
        by_shape = {f"{m} x {n}": time for (m, n), time in times.items()}
        told["tokens"][tokens] = {"ms": {**by_shape, "one layer": layer}, "share_of_steps": share}

    options.output.mkdir(parents=True, exist_ok=True)
    suffix = "_one_thread" if options.one_thread else ""
    (options.output / f"layers_{options.size}{suffix}.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
