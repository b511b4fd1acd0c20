"""transformers' small mixtures under FSDP2 and DeepSpeed, beside one process that sees the same tokens."""

import contextlib

import deepspeed
import torch
import torch.distributed as dist
from cells import start
from mixtures import build_mixture
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gracile import optim

STEPS, BATCH, LENGTH = 6, 8, 32


def tokens(step):
    return torch.randint(64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def share(step):
    size = BATCH // dist.get_world_size()
    return tokens(step)[dist.get_rank() * size :][:size]


def optimizer_for(model):
    return optim.GaLoreAdamW(optim.param_groups(model, rank=4, update_proj_gap=3), lr=3e-3)


def loop(model, optimizer, batch):
    for step in range(STEPS):
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {name: p.detach().clone() for name, p in whole.items()}


def under_fsdp(model, optimizer_for):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return loop(model, optimizer_for(model), share)


def under_zero(model, optimizer_for, stage):
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_for(model), config=config)
    for step in range(STEPS):
        engine.backward(engine(input_ids=share(step), labels=share(step)).loss)
        engine.step()
    found = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext():
            found[name] = p.detach().clone()
    engine.destroy()
    return found


def distance(build, optimizer_for, layout):
    """The largest distance of a parameter from that of one process, over its movement."""
    split, model = build(), build()
    under = under_fsdp(split, optimizer_for) if layout == "fsdp2" else under_zero(split, optimizer_for, int(layout[-1]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    alone = loop(model, optimizer_for(model), tokens)
    moved = {name: (p - before[name]).norm() for name, p in alone.items()}
    gaps = {name: (under[name] - p).norm() for name, p in alone.items()}
    return max(float(gap / moved[name] if moved[name] else gap) for name, gap in gaps.items())


def measure(cells):
    """Of each (mixture, layout) its distance."""
    start()
    return [distance(lambda: build_mixture(kind), optimizer_for, layout) for kind, layout in cells]  # noqa: B023
