"""Every way to split a model, over NCCL with one process on a GPU, beside a plain loop on the same GPU.

    python benchmarks/gpu_layouts.py             # results/gpu_layouts.json; about two minutes

A LLaMA-2M trains on the same random tokens in a plain loop and under DDP, FSDP2 and DeepSpeed's ZeRO 1, 2 and 3, with
refreshes or changes of masks; the weights at the end are compared, relative to how far they moved. One process is what
one card can show: that tensors, streams and collectives are right where nothing is exchanged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gracile import optim
from gracile.models import build_llama

ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
STEPS, BATCH, LENGTH = 7, 4, 64
LR: dict[str, Any] = {"lr": 1e-3}
RANKED = {"rank": 16, "update_proj_gap": 3}
MASKED = {"density": 0.4, "update_every": 2, "t_end": 6}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of groups, of the constructor
    "AdamW": ({}, LR),
    "GaLoreAdamW": (RANKED, LR),
    "GaLoreAdamW8bit": (RANKED, LR),
    "FiraAdamW": (RANKED, LR),
    "APOLLOAdamW": (RANKED, LR),
    "LDAdamW": ({"rank": 16}, LR),
    "RigLAdamW": (MASKED, LR),
}
LAYOUTS = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def built() -> nn.Module:
    torch.manual_seed(0)
    return build_llama("2m").cuda()


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    keys, more = CASES[name]
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), **more)
    groups = optim.param_groups(model, **keys)
    made: torch.optim.Optimizer = getattr(optim, name)(groups, **more)
    return made


def loss_of(model: Callable[..., Any], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1000, (BATCH, LENGTH), generator=generator).cuda()
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def loop(model: nn.Module, wrapped: Callable[..., Any], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    for step in range(STEPS):
        loss_of(wrapped, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: _whole(p).float().clone() for name, p in model.named_parameters()}


def _whole(p: Any) -> Tensor:
    whole: Tensor = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
    return whole


def under_deepspeed(name: str, stage: int) -> dict[str, Tensor]:
    import deepspeed

    model = built()
    options: dict[str, Any] = {"stage": stage}
    if stage == 3:
        options["stage3_param_persistence_threshold"] = 0
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,  # its own default is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": options,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(name, model), config=config)
    for step in range(STEPS):
        engine.backward(loss_of(engine, step))
        engine.step()
    found = {}
    for key, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext():
            found[key] = p.detach().float().clone()
    engine.destroy()
    return found


def trained(name: str, layout: str) -> dict[str, Tensor]:
    if layout.startswith("zero"):
        return under_deepspeed(name, int(layout[-1]))
    model = built()
    if layout == "fsdp2":
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer)
        fully_shard(model)
    wrapped = DistributedDataParallel(model) if layout == "ddp" else model
    return loop(model, wrapped, optimizer_of(name, model))


def far(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The largest distance of a parameter over its movement."""
    gaps = ((one[key] - other[key]).norm() / (one[key] - start[key]).norm().clamp_min(1e-30) for key in start)
    return max(map(float, gaps))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    results = Path(__file__).parent / "results" / "gpu_layouts.json"
    parser.add_argument("--output", type=Path, default=results)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_layouts.py needs a CUDA device: torch sees none")
    os.environ.update(ALONE)
    logging.disable(logging.WARNING)
    dist.init_process_group("nccl", device_id=torch.device("cuda:0"))
    told: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "of_movement": {}}
    for name in CASES:
        start = {key: p.detach().float().clone() for key, p in built().named_parameters()}
        plain = trained(name, "plain")
        row = told["of_movement"][name] = {"again": far(plain, trained(name, "plain"), start)}
        for layout in LAYOUTS:
            try:
                row[layout] = far(plain, trained(name, layout), start)
            except Exception as error:  # the others are still to be seen
                row[layout] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        print(name, row, flush=True)
        options.output.write_text(json.dumps(told, indent=1) + "\n")
    dist.destroy_process_group()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
