"""What optimizers of masks cost beside torch's fused AdamW on the same dense matrices, in one run; medians.

    python benchmarks/sparse_steps.py --size 60m
    python benchmarks/sparse_steps.py --size 350m --sparsity 0.9
    python benchmarks/sparse_steps.py --size 60m --one_thread       # on a machine that others use

1. A step between two changes of the masks, on the seven matrices of one layer of a LLaMA size.
2. A step with a change of all masks, as a multiple of a training step: forward and backward of these matrices at 1024
   tokens and the fused AdamW; and of the optimizer's own step.
3. Bytes of state as a share of AdamW's.

Contenders take turns. ``--one_thread`` takes one thread, and the time that it had a core.
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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gracile import optim
from gracile.models import SIZES

FLOOR = "torch AdamW fused"
TOKENS = 1024


def layer_shapes(size: str) -> list[tuple[int, int]]:
    h, f = SIZES[size]["hidden_size"], SIZES[size]["intermediate_size"]
    return [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]


def contenders(given: argparse.Namespace, every: int) -> dict[str, Callable[[list[nn.Parameter]], Any]]:
    plain: dict[str, Any] = {"lr": 1e-5, "weight_decay": given.weight_decay}
    keys = {**plain, "sparsity": given.sparsity, "update_every": every, "t_end": 10**9}
    still = {"block_size": given.block, "initial_sparsity": None, "drop_fraction": 0.3}
    return {
        FLOOR: lambda ps: torch.optim.AdamW(ps, **plain, fused=True),
        "SETAdamW": lambda ps: optim.SETAdamW(ps, **keys),
        "RigLAdamW": lambda ps: optim.RigLAdamW(ps, **keys),
        "SRigLAdamW": lambda ps: optim.SRigLAdamW(ps, **keys),
        "SRigLAdamW, no ablation": lambda ps: optim.SRigLAdamW(ps, **keys, gamma_sal=0),
        "BlockSparseAdamW": lambda ps: optim.BlockSparseAdamW(ps, **keys, **still),
        "SparseAdamW, momentum": lambda ps: optim.SparseAdamW(ps, **keys, grow="momentum"),
    }


def medians(runs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:  # the first turn warms up
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def stepped(shapes: list[tuple[int, int]], gradients: list[Tensor], make: Callable[..., Any]) -> Any:
    """An optimizer on new matrices that has taken its first steps."""
    parameters = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    optimizer = make(parameters)
    for p, G in zip(parameters, gradients, strict=True):
        p.grad = G
    for _ in range(3):
        optimizer.step()
    return optimizer


def passes(shapes: list[tuple[int, int]]) -> Callable[[], None]:
    """Forward and backward of the matrices."""
    weights = [torch.randn(shape, requires_grad=True) for shape in shapes]
    inputs = [torch.randn(TOKENS, n, requires_grad=True) for _, n in shapes]
    outputs = [torch.randn(TOKENS, m) for m, _ in shapes]

    def run() -> None:
        for W, x, dy in zip(weights, inputs, outputs, strict=True):
            F.linear(x, W).backward(dy)
            W.grad = x.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60m", choices=sorted(SIZES))
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--block", type=int, default=16, help="of blocks; it divides the size's matrices")
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--one_thread", action="store_true")
    given = parser.parse_args()
    clock = time.thread_time if given.one_thread else time.perf_counter
    if given.one_thread:
        torch.set_num_threads(1)
    shapes = layer_shapes(given.size)
    gradients = [torch.randn(shape) for shape in shapes]

    between = {name: stepped(shapes, gradients, make) for name, make in contenders(given, 10**9).items()}
    state = {name: optim.state_bytes(optimizer) for name, optimizer in between.items()}
    steps = medians({name: optimizer.step for name, optimizer in between.items()}, given.repeats, clock)
    del between
    changing = {name: stepped(shapes, gradients, make) for name, make in contenders(given, 1).items()}
    runs = {name: optimizer.step for name, optimizer in changing.items()} | {"passes": passes(shapes)}
    changes = medians(runs, max(3, given.repeats // 3), clock)
    training = changes["passes"] + steps[FLOOR]

    threads = f"{torch.get_num_threads()} thread(s)"
    print(f"{given.size}, one layer, sparsity {given.sparsity:g}, decay {given.weight_decay:g}, {threads}")
    print(f"a training step of {TOKENS} tokens: {training:.1f} ms, of it fused AdamW {steps[FLOOR]:.1f}")
    print(f"{'':26}{'step':>9}{'of fused':>10}{'change':>10}{'of a step':>11}{'of its own':>12}{'state':>8}")
    for name in steps:
        extra = "" if name == FLOOR else f"{changes[name]:10.1f}{changes[name] / training:11.2f}"
        extra += "" if name == FLOOR else f"{changes[name] / steps[name]:12.1f}"
        print(
            f"{name:26}{steps[name]:9.2f}{steps[name] / steps[FLOOR]:10.2f}{extra:>33}{state[name] / state[FLOOR]:8.2f}"
        )
    told = {"given": vars(given), "torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    told |= {"steps_ms": steps, "changes_ms": changes, "state_bytes": state}
    path = Path(__file__).parent / "results" / f"sparse_steps_{given.size}.json"
    path.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
