"""Layers for inference whose zeros are not stored, beside ``nn.Linear``; medians of one run.

    python benchmarks/sparse_layers.py
    python benchmarks/sparse_layers.py --one_thread             # on a machine that others use
    python benchmarks/sparse_layers.py --shapes 2736x1024 --sparsities 0.9 --tried

Each of the shapes of a LLaMA's MLP, at one token and at 256, in fp32 without bias. Half of the contenders hold the
same weight with a constant number of entries in a row, at random; half one of the same sparsity in random blocks, of 64
where that divides the shape, else of 32 or 16. torch's CSR three times: as ``to_sparse_csr`` gives it (64-bit places),
with 32-bit places, and one token as a vector. ``sparselab`` (pip) takes part where it is installed. ``--tried`` adds
other ways to compute the same, which the layers do not use.

Contenders take turns, so that a drift of the machine's speed meets all of them, in another order each time. Before
each, 64 MiB of something else are read, as the other layers of a model would be: weights come from memory, not
from a cache. ``--warm`` leaves that out. ``--one_thread`` takes one thread, and the time that it had a core: the turns
of other processes are not in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile.models.layers import BlockSparseLinear, CondensedLinear, CSRLinear

SHAPES = ("11008x4096", "4096x11008", "2736x1024", "1024x2736", "1376x512", "512x1376")  # 7B, 350M and 60M, out x in
FLOOR = "nn.Linear"
ELSEWHERE = 2**24  # fp32 elements that are read between two contenders
SPARSELAB = util.find_spec("sparselab") is not None
Run = Callable[[Tensor], Tensor]


def rows_of(m: int, n: int, sparsity: float) -> Tensor:
    """W (m x n) with k entries in each row: one anywhere in each k-th of it."""
    k = round((1 - sparsity) * n)
    edges = torch.arange(k + 1) * n // k
    places = edges[:-1] + (torch.rand(m, k) * edges.diff()).long()
    return torch.zeros(m, n).scatter_(1, places, torch.randn(m, k))


def blocks_of(m: int, n: int, sparsity: float, b: int) -> Tensor:
    """W (m x n) with whole blocks of entries."""
    count = m * n // b**2
    kept = torch.zeros(count)
    kept[torch.randperm(count)[: round((1 - sparsity) * count)]] = 1
    return torch.randn(m, n).mul_(kept.view(m // b, n // b).repeat_interleave(b, 0).repeat_interleave(b, 1))


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def contenders(by_rows: nn.Linear, by_blocks: nn.Linear, b: int) -> dict[str, tuple[nn.Linear, Run]]:
    """Each with the layer whose weight it holds."""
    weight = by_rows.weight.detach()
    wide = weight.to_sparse_csr()
    narrow = torch.sparse_csr_tensor(wide.crow_indices().int(), wide.col_indices().int(), wide.values(), weight.shape)
    found: dict[str, tuple[nn.Linear, Run]] = {
        FLOOR: (by_rows, by_rows),
        "torch CSR, 64-bit": (by_rows, lambda x: (wide @ x.mT).mT),
        "torch CSR, 32-bit": (by_rows, lambda x: (narrow @ x.mT).mT),
        "torch CSR, 32-bit, vector": (by_rows, lambda x: (narrow @ x[0])[None]),
        "CondensedLinear": (by_rows, CondensedLinear.from_linear(by_rows)),
        "CSRLinear": (by_rows, CSRLinear.from_linear(by_rows)),
        f"BlockSparseLinear, {b}": (by_blocks, BlockSparseLinear.from_linear(by_blocks, block=b)),
    }
    if SPARSELAB:
        found["sparselab"] = (by_rows, sparselab_layer(weight))
    return found


def sparselab_layer(weight: Tensor) -> Run:
    """Its layer's forward pass, without what it does for gradients."""
    import sparselab

    packed = sparselab.PaddedCSR.from_dense(weight, padding_ratio=0.0)
    return lambda x: sparselab.spmm(packed, x.mT.contiguous()).mT


# ---- ways that the layers do not take ------------------------------------------------------------------------------


def tried(by_rows: nn.Linear, by_blocks: nn.Linear, b: int) -> dict[str, tuple[nn.Linear, Run]]:
    return {
        **{f"  {name}": (by_rows, run) for name, run in tried_rows(by_rows).items()},
        **{f"  {name}": (by_blocks, run) for name, run in tried_blocks(by_blocks, b).items()},
    }


def tried_rows(linear: nn.Linear) -> dict[str, Run]:
    layer = CondensedLinear.from_linear(linear)
    values, columns = layer.values, layer.columns
    m, k = values.shape
    short, long = columns.short(), columns.long()
    values_t, columns_t = values.T.contiguous(), columns.T.contiguous()

    def gathered(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:  # the authors' expression, for one token
        return (x[0][columns.int()] * values).sum(1)[None]

    def gathered_columns(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        return (x[0][columns] * values).sum(0)[None]

    compiled, compiled_columns = torch.compile(gathered), torch.compile(gathered_columns)
    return {
        "gather, sum": lambda x: gathered(x, columns, values),
        "gather, sum, 64-bit": lambda x: (x[0][long] * values).sum(1)[None],
        "index_select, mul_, sum": lambda x: (
            x[0].index_select(0, columns.view(-1)).view(m, k).mul_(values).sum(1)[None]
        ),
        "take, vecdot": lambda x: torch.linalg.vecdot(x[0].take(long), values)[None],
        "index_select, bmm": lambda x: torch.bmm(
            x[0].index_select(0, columns.view(-1)).view(m, 1, k), values.view(m, k, 1)
        ).view(1, m),
        "torch.compile, 32-bit": lambda x: compiled(x, columns, values),
        "torch.compile, 16-bit": lambda x: compiled(x, short, values),
        "torch.compile, k x m": lambda x: compiled_columns(x, columns_t, values_t),
        "embedding_bag": lambda x: bags(x, columns, values),
        "embedding_bag, 64 tokens": lambda x: torch.cat([bags(part, columns, values) for part in x.split(64)]),
    }


def bags(x: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    return F.embedding_bag(columns, x.mT.contiguous(), mode="sum", per_sample_weights=values).mT


def tried_blocks(linear: nn.Linear, b: int) -> dict[str, Run]:
    W = linear.weight.detach()
    m, n = W.shape
    kept = (W != 0).view(m // b, b, n // b, b).any(3).any(1)
    rows, columns = kept.nonzero(as_tuple=True)
    blocks = W.view(m // b, b, n // b, b).permute(0, 2, 1, 3)[rows, columns]  # out x in
    turned = blocks.mT.contiguous()
    counts = kept.sum(1)
    starts = F.pad(counts.cumsum(0), (1, 0)).int()
    bsr = torch.sparse_bsr_tensor(starts, columns.int(), blocks, (m, n))
    longest = int(counts.max())
    padded_columns, padded = columns.new_zeros(m // b, longest), W.new_zeros(m // b, longest, b, b)
    slots = torch.arange(len(rows)) - starts.long()[rows]
    padded_columns[rows, slots], padded[rows, slots] = columns, turned
    padded = padded.view(m // b, longest * b, b)
    lengths = counts.tolist()

    def by_padded_rows(x: Tensor) -> Tensor:
        picked = x.view(len(x), -1, b).transpose(0, 1).index_select(0, padded_columns.view(-1))
        picked = picked.view(m // b, longest, len(x), b).transpose(1, 2).reshape(m // b, len(x), longest * b)
        return torch.bmm(picked, padded).transpose(0, 1).reshape(len(x), m)

    def by_loop(x: Tensor) -> Tensor:
        inputs, y = x.view(len(x), -1, b), x.new_empty(len(x), m)
        for V, C, out in zip(turned.split(lengths), columns.split(lengths), y.split(b, 1), strict=True):
            torch.mm(inputs.index_select(1, C).view(len(x), -1), V.view(-1, b), out=out)
        return y

    def out_by_in(x: Tensor) -> Tensor:
        picked = x.view(len(x), -1, b).transpose(0, 1).index_select(0, columns)
        y = x.new_zeros(m // b, len(x), b).index_add_(0, rows, torch.bmm(picked, blocks.mT))
        return y.transpose(0, 1).reshape(len(x), m)

    return {
        "torch BSR": lambda x: (bsr @ x.mT).mT,
        "rows of blocks, padded": by_padded_rows,
        "rows of blocks, in a loop": by_loop,
        "blocks out x in": out_by_in,
    }


# ---- measuring ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def medians(runs: dict[str, tuple[nn.Linear, Run]], x: Tensor, repeats: int, warm: bool) -> dict[str, float]:
    """Milliseconds of each contender, taking turns; each has to give what its layer gives."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {}
    for name, (linear, run) in runs.items():  # warms up
        error = float(torch.linalg.vector_norm(run(x) - linear(x)) / torch.linalg.vector_norm(linear(x)))
        if not error < 1e-4:
            raise AssertionError(f"{name.strip()} is off by {error:.1e}")
        times[name] = []
    elsewhere, names = torch.zeros(1 if warm else ELSEWHERE), list(runs)
    for _ in range(repeats):
        for name in random.sample(names, len(names)):
            run = runs[name][1]
            elsewhere.sum()
            start = clock()
            run(x)
            times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def one_token_alone(name: str) -> bool:
    return name.strip().startswith(("gather", "index_select", "take", "torch.compile")) or name.endswith("vector")


def measured(shape: str, sparsity: float, options: argparse.Namespace) -> dict[int, dict[str, float]]:
    m, n = (int(side) for side in shape.split("x"))
    b = next(b for b in (64, 32, 16) if m % b == n % b == 0)
    layers = linear_of(rows_of(m, n, sparsity)), linear_of(blocks_of(m, n, sparsity, b))
    runs = contenders(*layers, b) | (tried(*layers, b) if options.tried else {})
    found = {}
    for tokens in options.tokens:
        able = {name: run for name, run in runs.items() if tokens == 1 or not one_token_alone(name)}
        found[tokens] = medians(able, torch.randn(tokens, n), options.repeats, options.warm)
    return found


def table(shape: str, sparsity: float, times: dict[int, dict[str, float]]) -> str:
    head = "".join(f"{f'{tokens} token' + ('s' if tokens > 1 else ''):>24}" for tokens in times)
    lines = [f"{shape}, {sparsity:.0%} zeros" + " " * (31 - len(shape)) + head]
    for name in max(times.values(), key=len):
        cells = [
            f"{ms[name]:12.3f} ms {ms[FLOOR] / ms[name]:7.2f} x" if name in ms else f"{'':>24}" for ms in times.values()
        ]
        lines.append(f"  {name:<38}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--warm", action="store_true", help="weights may stay in the caches")
    parser.add_argument("--tried", action="store_true", help="also ways that the layers do not take")
    parser.add_argument("--one_thread", "--one-thread", action="store_true", help="and its own time only")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support is in beta")
    warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
    torch.manual_seed(0)
    random.seed(0)
    if options.one_thread:
        torch.set_num_threads(1)
    packages = ("torch", "sparselab") if SPARSELAB else ("torch",)
    told: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "weights": "warm" if options.warm else "cold",
        "ms": {},
    }
    if not SPARSELAB:
        print("sparselab is not installed: it does not take part")
    print(f"milliseconds, and how many times as fast as {FLOOR}; {told['machine']}\n")
    for shape in options.shapes:
        for sparsity in options.sparsities:
            times = measured(shape, sparsity, options)
            print(table(shape, sparsity, times) + "\n", flush=True)
            told["ms"].setdefault(shape, {})[str(sparsity)] = times
    options.output.mkdir(parents=True, exist_ok=True)
    suffix = (
        ("_tried" if options.tried else "")
        + ("_warm" if options.warm else "")
        + ("_one_thread" if options.one_thread else "")
    )
    (options.output / f"sparse_layers{suffix}.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
