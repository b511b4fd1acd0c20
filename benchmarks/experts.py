"""Experts in one tensor (E, m, n): what a step costs beside the same matrices as separate layers, and what state.

    python benchmarks/experts.py            # one thread; the tables in RESULTS.md

Contenders take turns; medians. Below one, the tensor is faster. State is planned for models of transformers' default
sizes, which are those of published ones, in bf16 at rank 128.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from gracile import optim
from gracile.optim.memory import planned_state

EXPERTS, TURNS = 8, 41
SIZES = [(48, 32), (192, 64), (768, 256), (1408, 512)]
RANKED: dict[str, Any] = {"rank": 8, "update_proj_gap": 10**6}
MASKED: dict[str, Any] = {"density": 0.3, "update_every": 10**6, "t_end": 10**6}
CASES: dict[str, dict[str, Any]] = {
    "GaLoreAdamW": RANKED,
    "GaLoreAdamW8bit": RANKED,
    "FiraAdamW": RANKED,
    "APOLLOAdamW": RANKED,
    "LDAdamW": {"rank": 8},
    "RigLAdamW": MASKED,
    "SRSTEAdamW": {"n": 2, "m": 4},
}


def stepped(name: str, tensors: list[torch.Tensor]) -> Callable[[], object]:
    parameters = [nn.Parameter(tensor.clone()) for tensor in tensors]
    optimizer = getattr(optim, name)([{"params": parameters, **CASES[name]}], lr=1e-4)
    for p in parameters:
        p.grad = 0.01 * torch.randn_like(p)
    for _ in range(2):  # the first finds subspaces and masks
        optimizer.step()
    step: Callable[[], object] = optimizer.step
    return step


def state() -> None:
    """GaLore's state of real mixtures beside AdamW's, and how many of their matrices have a rank."""
    print("| mixture | parameters | of its matrices ranked | state, GiB | of AdamW's |\n|---|---|---|---|---|")
    for kind in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"):
        config = transformers.AutoConfig.for_model(kind)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        groups = optim.param_groups(model, rank=128)
        held = sum(own.nbytes for own in planned_state(optim.GaLoreAdamW(groups, state_dtype=torch.bfloat16)))
        outer = ("embed_tokens.weight", "lm_head.weight", "bias")
        matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith(outer))
        ranked = sum(p.numel() for p in groups[0]["params"])
        whole = sum(p.numel() for p in model.parameters())
        cells = f"{whole / 1e9:.1f}B", f"{ranked / matrices:.2%}", f"{held / 2**30:.1f}", f"{held / (4 * whole):.3f}"
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    state()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = [f"{m} x {n}" for m, n in SIZES]
    print(f"| {EXPERTS} experts, of separate layers' | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name in CASES:
        row = []
        for m, n in SIZES:
            W = 0.1 * torch.randn(EXPERTS, m, n)
            runs = {"one tensor": stepped(name, [W]), "separate": stepped(name, list(W))}
            times: dict[str, list[float]] = {key: [] for key in runs}
            for _ in range(TURNS):
                for key, run in runs.items():
                    start = time.perf_counter()
                    run()
                    times[key].append(time.perf_counter() - start)
            one, many = (statistics.median(times[key]) for key in ("one tensor", "separate"))
            row.append(f"{one / many:.2f}")
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
