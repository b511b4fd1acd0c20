"""What must be seen on a GPU: every optimizer beside its twin on the CPU, where a step waits, its launches, its cost.

    python benchmarks/gpu_check.py                       # results/gpu_check.json and .md; about five minutes
    python benchmarks/gpu_check.py --only GaLoreAdamW    # some

1. Every variant of ``tests/catalogue.py``: 14 steps on matrices of a LLaMA-60M's shapes, with refreshes or changes of
   masks, on the GPU and on the CPU from the same weights and gradients; waits for the device (``set_sync_debug_mode``)
   and kernels launched in an ordinary step and in the busiest one; state saved, loaded and gone on with, to the bit.
2. Of each, a step that a CUDA graph replays (``capturable=True``), and one that torch.compile generates code for,
   beside its twin that does without (``--skip_graphs``: compiling takes as long as all else).
3. A step between refreshes at 350M and 1B beside torch's fused AdamW, galore-torch, apollo-torch and bitsandbytes,
   and the allocator's peak over a step, beside which ``--plans`` puts what is planned for it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from gracile import optim
from gracile.train.measurement import fake_step

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import recorded_graph  # noqa: E402
from catalogue import VARIANTS  # noqa: E402
from optimizer_step import contenders, layer_shapes  # noqa: E402

STEPS, GAP, ORDINARY = 14, 4, 11  # refreshes and changes on steps 0, 4, 8, 12
RANK = 32
SHAPES = [(512, 512)] * 4 + [(1376, 512), (512, 1376)]
PLAIN = [(640, 512), (512,)]
SIZES = {"350m": 256, "1b": 512}  # and the rank of GaLore's recipe
LAYERS = {"350m": 24, "1b": 24}


def optimizer_of(name: str, parameters: list[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    """As the catalogue has it, matrices at a rank that suits these shapes, the others in a group of their own."""
    variant = VARIANTS[name]
    assert variant.quadratic is not None
    keys = dict(variant.quadratic.matrices or {})
    if keys.get("rank", 1) > 1:
        keys["rank"] = RANK
    if keys.get("block_size") == 1:
        keys["block_size"] = 16
    matrices, others = parameters[: len(SHAPES)], parameters[len(SHAPES) :]
    return variant.cls([{"params": matrices, **keys}, {"params": others}], **variant.quadratic.keys, **more)


def gradients(step: int) -> list[Tensor]:
    """Drawn on the CPU: a part that stays, of falling singular values, and noise."""
    staying, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(1000 + step)
    drawn = []
    for shape in SHAPES + PLAIN:
        G = 0.1 * torch.randn(shape, generator=noise)
        if len(shape) == 2:
            left, right = (torch.randn(side, 48, generator=staying) for side in shape)
            G += (left * 0.9 ** torch.arange(48)) @ right.t() / 7
        drawn.append(G)
    return drawn


def twins(name: str, devices: tuple[str, str] = ("cpu", "cuda"), **more: Any) -> tuple[Any, Any]:
    """The same parameters and optimizer on two devices, by default the CPU and the GPU."""
    generator = torch.Generator().manual_seed(0)
    values = [0.1 * torch.randn(shape, generator=generator) for shape in SHAPES + PLAIN]
    made = []
    for device in devices:
        parameters = [nn.Parameter(v.clone().to(device)) for v in values]
        torch.manual_seed(0)
        made.append((parameters, optimizer_of(name, parameters, **more)))
    return made[0], made[1]


def give(parameters: list[nn.Parameter], step: int) -> None:
    for p, G in zip(parameters, gradients(step), strict=True):
        if p.grad is None:
            p.grad = G.to(p.device)
        else:
            p.grad.copy_(G)


def waits(run: Callable[[], object]) -> dict[str, int]:
    """The places in this package that wait for the device while ``run`` runs, and how often."""
    found: dict[str, int] = {}

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            place = f"{Path(filename).name}:{lineno}"
            found[place] = found.get(place, 0) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown, warnings.showwarning = warnings.showwarning, note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = shown
    return found


def launches(run: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as told:
        run()
        torch.cuda.synchronize()
    return sum(e.count for e in told.key_averages() if "LaunchKernel" in e.key)


def far(one: list[nn.Parameter], other: list[nn.Parameter], first: list[Tensor]) -> tuple[float, float]:
    """The largest distance of a matrix over its movement, and the share of weights that are more than 1e-3 of the mean
    movement apart (a weight on the other side of a mask, a turned vector)."""
    worst, apart, count = 0.0, 0, 0
    for a, b, start in zip(one, other, first, strict=True):
        moved, gap = (b.detach().cpu() - start).double(), (b.detach().cpu() - a.detach()).double()
        worst = max(worst, float(gap.norm() / moved.norm().clamp_min(1e-30)))
        apart += int((gap.abs() > 1e-3 * moved.abs().mean()).sum())
        count += gap.numel()
    return worst, apart / count


def check(name: str) -> dict[str, Any]:
    """One variant on both devices."""
    (host, on_host), (held, on_device) = twins(name)
    first = [p.detach().clone() for p in host]
    told: dict[str, Any] = {"waits": {}, "launches": {}}
    saved: Any = None
    for step in range(STEPS):
        give(host, step)
        on_host.step()
        give(held, step)
        torch.cuda.synchronize()
        if step in (8, ORDINARY):
            kind = "ordinary" if step == ORDINARY else "busy"
            told["waits"][kind] = waits(on_device.step)
        elif step in (ORDINARY - 1, ORDINARY + 1):
            kind = "ordinary" if step < ORDINARY else "busy"
            told["launches"][kind] = launches(on_device.step)
        else:
            on_device.step()
        if step == 5:
            saved = copy.deepcopy((on_device.state_dict(), [p.detach().clone() for p in held]))
    told["of_movement"], told["apart"] = far(host, held, first)
    told["resumed"] = goes_on(name, saved, held)
    return told


def goes_on(name: str, saved: Any, expected: list[nn.Parameter]) -> bool:
    """Whether a fresh optimizer with the state of step 5 ends where the other did, to the bit."""
    state, values = saved
    parameters = [nn.Parameter(v) for v in values]
    optimizer = optimizer_of(name, parameters)
    optimizer.load_state_dict(state)
    for step in range(6, STEPS):
        give(parameters, step)
        optimizer.step()
    return all(torch.equal(p, q) for p, q in zip(parameters, expected, strict=True))


# ---- as a graph -----------------------------------------------------------------------------------------------------


def replayed(name: str, device: str = "cuda") -> dict[str, Any]:
    """How far replays of one captured step end from the steps, of the movement; or why none is captured. On the CPU the
    graph is one of ``tests/recorded_graph.py``."""
    try:
        (held, one), (others, twin) = twins(name, (device, device), capturable=True)
    except ValueError as reason:
        return {"refused": str(reason).rsplit(": ", 1)[-1]}
    first = [p.detach().cpu().clone() for p in held]
    graph: Any = None
    left = count = 0
    for step in range(STEPS):
        for parameters in (held, others):
            give(parameters, step)
        twin.step()
        if left:
            graph = graph or captured(one, device)
            graph.replay()
            left, count = left - 1, count + 1
        else:
            one.step()
            left = one.steps_until_refresh()
    return {"replays": count, "of_movement": far([p.detach().cpu() for p in others], held, first)[0]}


def captured(optimizer: torch.optim.Optimizer, device: str) -> Any:
    if device == "cpu":
        return recorded_graph.captured(optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def compiled(name: str, device: str = "cuda", backend: str = "inductor") -> dict[str, Any]:
    """How far compiled steps end from those that are not, of the movement; graphs after the first step and the last."""
    torch._dynamo.reset()
    counters.clear()
    (held, one), (others, twin) = twins(name, (device, device))
    first = [p.detach().cpu().clone() for p in held]
    step, graphs = torch.compile(one.step, backend=backend), []
    for number in range(STEPS):
        for parameters in (held, others):
            give(parameters, number)
        step()
        twin.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return {"graphs": [graphs[0], graphs[-1]], "of_movement": far([p.detach().cpu() for p in others], held, first)[0]}


# ---- what it costs --------------------------------------------------------------------------------------------------


def cost(size: str, repeats: int, budget: float) -> dict[str, dict[str, float]]:
    """Milliseconds of a step (the median) and MiB beyond what is held, of every contender on all matrices of a size.

    ``budget`` bounds the layers: seconds that all contenders together may take.
    """
    rank = SIZES[size]
    shapes = layer_shapes(size) * LAYERS[size]
    told: dict[str, dict[str, float]] = {}
    held = [nn.Parameter(0.02 * torch.randn(shape, device="cuda")) for shape in shapes]
    for p in held:
        p.grad = torch.randn_like(p)
    began = time.perf_counter()
    made = contenders(rank)
    late = ["galore-torch"]  # which finds exact vectors first, for a minute
    peers = [name for name in made if not hasattr(optim, name) and name not in late]
    for name in [*peers, *(name for name in made if name not in [*peers, *late]), *late]:
        make = made[name]
        if time.perf_counter() - began > budget:
            print(f"{size}: no time left for {name} and what follows", flush=True)
            break
        optimizer = make(held)
        for _ in range(2):
            optimizer.step()
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        told[name] = {"ms": statistics.median(times), "peak_mib": peak}
        print(f"{size} {name:<28} {told[name]['ms']:9.2f} ms   {peak:8.1f} MiB", flush=True)
        del optimizer
        torch.cuda.empty_cache()
    return told


def add_plans(told: dict[str, Any]) -> None:
    """MiB that a step between refreshes is planned to need for a moment, beside what was measured. Needs no GPU."""
    for size, rows in told["costs"].items():
        made = contenders(SIZES[size])
        shapes = layer_shapes(size) * LAYERS[size]
        for name, row in rows.items():
            if hasattr(optim, name):
                optimizer = made[name]([nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes])
                row["planned_mib"] = fake_step._FakeStep(optimizer, None, 0, 1, None, "meta").bytes_at(1) / 2**20


# ---- the report -----------------------------------------------------------------------------------------------------


def as_graph(told: dict[str, Any] | None) -> str:
    """A cell of the table: not seen, refused, failed, or how far from steps."""
    if told is None or "of_movement" not in told:
        return "" if told is None else str(told.get("refused") or told["error"])
    how = f"{told['replays']} replays" if "replays" in told else "{} to {} graphs".format(*told["graphs"])
    return f"{told['of_movement']:.1e}, {how}"


def table(told: dict[str, Any]) -> str:
    lines = [f"{told['device']}, torch {told['torch']}, CUDA {told['cuda']}", ""]
    heads = ["optimizer", "from the CPU, of its movement", "weights apart"]
    heads += ["waits: step / busy", "launches: step / busy", "resumed", "replayed", "compiled"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in told["variants"].items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | | | |")
            continue
        pause = " / ".join(str(sum(row["waits"][k].values())) for k in ("ordinary", "busy"))
        launched = " / ".join(str(row["launches"][k]) for k in ("ordinary", "busy"))
        same = "to the bit" if row["resumed"] else "DIFFERS"
        cells = [f"{row['of_movement']:.1e}", f"{row['apart']:.4f}", pause, launched, same]
        lines.append(f"| {' | '.join([name, *cells, *map(as_graph, (row.get('replayed'), row.get('compiled')))])} |")
    for size, rows in told.get("costs", {}).items():
        base = rows.get("torch AdamW fused", {}).get("ms")
        heads = [f"all matrices of {size}", "ms", "of fused AdamW", "peak beyond what is held", "planned"]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name, row in rows.items():
            share = f"{row['ms'] / base:.1f}" if base else ""
            peak = f"{row['peak_mib']:.0f} MiB"
            plan = f"{row['planned_mib']:.0f} MiB" if "planned_mib" in row else ""
            lines.append(f"| {name} | {row['ms']:.2f} | {share} | {peak} | {plan} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="variants whose names hold one of these")
    parser.add_argument("--skip_costs", action="store_true")
    parser.add_argument("--skip_graphs", action="store_true")
    parser.add_argument("--plans", action="store_true", help="only put plans beside the results that are there")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for the steps of a size")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu_check.json")
    options = parser.parse_args()
    if options.plans:
        told = json.loads(options.output.read_text())
        add_plans(told)
        options.output.write_text(json.dumps(told, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(table(told))
        return
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check.py needs a CUDA device: torch sees none")
    told = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    told |= {"cuda": torch.version.cuda, "variants": {}, "costs": {}}

    def keep() -> None:
        options.output.write_text(json.dumps(told, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(table(told))

    if not options.skip_costs:  # first: what is left of a short loan goes to the variants
        for size in SIZES:
            told["costs"][size] = cost(size, options.repeats, options.budget)
            keep()
    names = [n for n, v in VARIANTS.items() if v.quadratic and (not options.only or any(t in n for t in options.only))]
    for name in names:
        try:
            told["variants"][name] = check(name)
        except Exception as error:  # the others are still to be seen
            told["variants"][name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        for what, see in () if options.skip_graphs else (("replayed", replayed), ("compiled", compiled)):
            try:
                told["variants"][name][what] = see(name)
            except Exception as error:
                told["variants"][name][what] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(name, told["variants"][name], flush=True)
        keep()
    print(table(told))


if __name__ == "__main__":
    main()
