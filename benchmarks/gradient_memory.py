"""Gradients that are there at most while LLaMA-350M passes, kept and freed in several ways, counted on a CPU; MiB.

    python benchmarks/gradient_memory.py [--size 350m] [--way NAME]

In bf16, with rank 256, 4 passes of 16 tokens a step where passes are added up, and activations checkpointed. At each
gradient that is complete the gradients that are there are counted, by their storages, and the one that is being added;
beside it what torch's profiler saw allocated in the passes, activations among it. Each way is a process of its own;
about 3 GiB are needed for the first. In the published package each parameter has an optimizer that moves it in the
backward pass, as its script does layer by layer; its exact SVD, which no gradient waits for, is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from gracile.models.llama import llama_config
from gracile.optim import GaLoreAdamW, param_groups, release_gradients
from gracile.optim.core.projected_gradient import ProjectedGradient
from gracile.optim.released import is_freed
from gracile.train.measurement.measure import allocations, storage_bytes

RANK, GAP, PASSES, TOKENS = 256, 200, 4, 16
MIB = 2**20
RESULT = Path(__file__).with_name("results") / "gradient_memory.md"
FIRST, TURN, BETWEEN = "the first", "of a refresh", "between refreshes"
# by name: what is kept, passes a step, matrices that are refreshed at once; None keeps all
WAYS: dict[str, tuple[str | None, int, int | None]] = {
    "all gradients": (None, PASSES, None),
    "coordinates": ("coordinates", PASSES, None),
    "coordinates, refreshes_at_once=2": ("coordinates", PASSES, 2),
    "coordinates, passes=1": ("coordinates", 1, None),
    "nothing": ("nothing", 1, None),
    "galore-torch, an optimizer each": ("published", 1, None),
}


def held_by(p: Tensor) -> list[Tensor]:
    if p.grad is None or is_freed(p.grad):
        return []
    if not isinstance(p.grad, ProjectedGradient):
        return [p.grad]
    return [*p.grad.kept] + ([] if p.grad.one_norm is None else [p.grad.one_norm])


class Watch:
    """The most bytes of gradients that were there at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters, self.most = list(model.parameters()), 0
        for p in self.parameters:
            p.register_hook(partial(self._comes, p))
            p.register_post_accumulate_grad_hook(self._is_complete)

    def _comes(self, p: Tensor, gradient: Tensor) -> None:
        """A gradient, before it is added."""
        self._count([gradient])

    def _is_complete(self, p: Tensor) -> None:
        self._count([])

    def _count(self, more: list[Tensor]) -> None:
        here = [tensor for p in self.parameters for tensor in held_by(p)]
        self.most = max(self.most, storage_bytes([*here, *more]))


def published(model: nn.Module) -> None:
    """galore-torch 1.0 as its script pretrains layer by layer."""
    from galore_torch import GaLoreAdamW as Published

    torch.linalg.svd = lambda M, full_matrices=True: (M[:, :1].expand(-1, len(M)), M[0], M)
    keys = {"rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    for group in param_groups(model, rank=RANK):
        for p in group["params"]:
            own = {"params": [p], **(keys if "rank" in group else {})}
            p.register_post_accumulate_grad_hook(partial(_step, Published([own], lr=0.01, no_deprecation_warning=True)))


def _step(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()


def measured(name: str, size: str) -> dict[str, list[float]]:
    """By kind of step MiB of gradients at most, and of all that was new in its passes."""
    keep, passes, at_once = WAYS[name]
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(llama_config(size), dtype=torch.bfloat16).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    watch = Watch(model)
    optimizer = None
    if keep == "published":
        published(model)
    else:
        groups = param_groups(model, rank=RANK, update_proj_gap=GAP, refreshes_at_once=at_once)
        optimizer = GaLoreAdamW(groups, lr=0.01, state_dtype=torch.bfloat16)
        if keep:
            release_gradients(model, optimizer, keep=keep, passes=1 if passes == 1 else None)
    clocks = {FIRST: 0, TURN: GAP + 3 if at_once else GAP, BETWEEN: GAP + 150}
    told = {}
    for kind, clock in clocks.items():
        for state in optimizer.state.values() if optimizer and kind != FIRST else ():
            state["step"].fill_(clock)
        told[kind] = [bytes_ / MIB for bytes_ in _one_step(model, optimizer, passes, watch)]
    return told


def _one_step(model: Any, optimizer: torch.optim.Optimizer | None, passes: int, watch: Watch) -> tuple[int, int]:
    watch.most, new = 0, 0
    tokens = torch.randint(model.config.vocab_size, (1, TOKENS))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(passes):
            model(input_ids=tokens, labels=tokens).loss.backward()
    new = _peak(profiler)
    del profiler
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return watch.most, new


def _peak(profiler: profile) -> int:
    total = most = 0
    made = allocations(profiler, torch.device("cpu"))
    for _, change in sorted([(one.begin, one.size) for one in made] + [(one.end, -one.size) for one in made]):
        total += change
        most = max(most, total)
    return most


def main(report: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="350m")
    parser.add_argument("--way", choices=WAYS)
    chosen = parser.parse_args()
    if chosen.way:
        report(json.dumps(measured(chosen.way, chosen.size)))
        return
    lines = [
        f"MiB of gradients at most in a step of LLaMA-{chosen.size} in bf16, rank {RANK}; with all that is new.",
        "",
        f"| kept | passes | step: {FIRST} | {TURN} | {BETWEEN} |\n|---|---|---|---|---|",
    ]
    for name, (_, passes, _) in WAYS.items():
        command = [sys.executable, __file__, "--size", chosen.size, "--way", name]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        row = [f"{own:.0f} ({new:.0f})" for own, new in told.values()]
        lines.append(f"| {name} | {passes} | {' | '.join(row)} |")
        report(lines[-1])
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
