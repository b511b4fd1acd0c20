"""Tokens a second of whole training beside torch's fused AdamW: LLaMA-60M on two CPU threads, 2048 tokens a step.

    python benchmarks/training_speed.py --rounds 12

One model passes forward and backward; every contender then steps its weights with the same gradients, in turn, so that
a drift of the machine's speed meets all of them. Tokens a second follow from the medians of a pass and a step, and from
what a refresh takes more, once in 200 steps.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import apollo_torch
import galore_torch
import torch
from torch import nn

from gracile import optim
from gracile.models import build_llama

RANK, GAP, TOKENS = 128, 200, (8, 256)
SHARED = {"rank": RANK, "proj_type": "std"}


def contenders(
    matrices: list[nn.Parameter], others: list[nn.Parameter]
) -> dict[str, Callable[[int], torch.optim.Optimizer]]:
    """Optimizers by the steps between refreshes."""

    def ours(
        cls: type[torch.optim.Optimizer], has_gap: bool = True, **keys: object
    ) -> Callable[[int], torch.optim.Optimizer]:
        def make(gap: int) -> torch.optim.Optimizer:
            own = {**SHARED, **({"update_proj_gap": gap} if has_gap else {})}
            return cls([{"params": matrices, **own}, {"params": others}], lr=1e-6, **keys)

        return make

    def theirs(
        cls: type[torch.optim.Optimizer], more: dict[str, object], **keys: object
    ) -> Callable[[int], torch.optim.Optimizer]:
        def make(gap: int) -> torch.optim.Optimizer:
            own = {**SHARED, "update_proj_gap": gap, "scale": 0.25, **more}
            return cls([{"params": matrices, **own}, {"params": others}], lr=1e-6, **keys)

        return make

    peer = {"proj": "random", "scale_type": "channel", "scale": 1.0}
    return {
        "AdamW, fused": lambda gap: torch.optim.AdamW([*matrices, *others], lr=1e-6, fused=True),
        "GaLoreAdamW": ours(optim.GaLoreAdamW),
        "galore-torch": theirs(galore_torch.GaLoreAdamW, {}, no_deprecation_warning=True),
        "APOLLOAdamW": ours(optim.APOLLOAdamW),
        "apollo-torch": theirs(apollo_torch.APOLLOAdamW, peer),
        "GradNormLoRPAdamW": ours(optim.GradNormLoRPAdamW),
        "FiraAdamW": ours(optim.FiraAdamW),
        "GaLorePlusAdamW": ours(optim.GaLorePlusAdamW),
        "GaLoreAdamW8bit": ours(optim.GaLoreAdamW8bit),
        "DCTAdamW": ours(optim.DCTAdamW, False),
        "LDAdamW": ours(optim.LDAdamW, False),
    }  # fmt: skip


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def passes(model: nn.Module) -> Iterator[float]:
    """Milliseconds of a pass, with new gradients each time."""
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(32000, TOKENS, generator=generator)
        model.zero_grad(set_to_none=False)
        yield timed(lambda tokens=tokens: model(input_ids=tokens, labels=tokens).loss.backward())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", default="", help="those with this in their name, and AdamW")
    rounds, only = (lambda options: (options.rounds, options.only))(parser.parse_args())
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = build_llama("60m")
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = [p for p in model.parameters() if p.dim() == 2 and "layers" in names[id(p)]]
    others = [p for p in model.parameters() if p.dim() != 2 or "layers" not in names[id(p)]]
    made = {name: make for name, make in contenders(matrices, others).items() if only in name or "fused" in name}
    # a refresh in every second step, which is taken apart below
    optimizers = {name: make(2) for name, make in made.items()}
    spent: dict[str, list[list[float]]] = {name: [[], []] for name in made}
    of_passes = []
    for turn, took in zip(range(2 * rounds + 4), passes(model), strict=False):
        for name, optimizer in optimizers.items():
            step = timed(optimizer.step)
            if turn >= 4:
                spent[name][turn % 2].append(step)
        if turn >= 4:
            of_passes.append(took)
    whole = statistics.median(of_passes)
    print(f"{platform.processor() or platform.machine()}, 2 threads; a pass takes {whole:,.0f} ms\n")
    print("| optimizer | a step, ms | a refresh more, ms | tokens/s of fused AdamW's |\n|---|---|---|---|")
    total = {}
    for name, (refreshing, ordinary) in spent.items():
        step, more = statistics.median(ordinary), statistics.median(refreshing) - statistics.median(ordinary)
        total[name] = whole + step + max(0.0, more) / GAP
        print(
            f"| {name} | {step:,.1f} | {max(0.0, more):,.1f} | {total['AdamW, fused'] / total[name]:.3f} |", flush=True
        )


if __name__ == "__main__":
    main()
