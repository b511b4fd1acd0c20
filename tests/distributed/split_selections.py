"""Selections of every method under DDP, FSDP2 and DeepSpeed, beside one process that sees the same tokens."""

import contextlib
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from cells import start
from selected_models import llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from gracile.optim import SparseAdamW
from gracile.selections import save_delta, selection_groups

STEPS, BATCH = 5, 8
KEYS = {
    "hft": {"seed": 1},
    "s2ft": {"down_ratio": 0.1, "up_ratio": 0.1, "o_ratio": 0.25, "v_ratio": 0.25},
    "sara": {"share": 0.2, "reselect_every": 2},
}


def tokens(step):
    return torch.randint(64, (BATCH, 12), generator=torch.Generator().manual_seed(step))


def share(step):
    size = BATCH // dist.get_world_size()
    return tokens(step)[dist.get_rank() * size :][:size]


def optimizer_for(name, model, wrapped=False):
    make = torch.optim.AdamW if name == "hft" else SparseAdamW
    make = partial(ZeroRedundancyOptimizer, optimizer_class=make) if wrapped else make
    groups = selection_groups(model, name, **KEYS[name])
    return make(groups, lr=3e-3, eps=1e-4, weight_decay=0.1)  # no signs of gradients that are rounding


def held(optimizer):
    """How many weights have moments, over all parameters of this process."""
    held = getattr(optimizer, "optim", optimizer).state
    moments = [v for state in held.values() for k, v in state.items() if k.endswith("exp_avg")]
    return sum((v.to_local() if hasattr(v, "to_local") else v).numel() for v in moments)


def loop(optimizer, model, batch):
    for step in range(STEPS):
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    named = [(name.removeprefix("module."), p.detach()) for name, p in model.named_parameters()]
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in named}, held(optimizer)


def under_ddp(name, wrapped=False):
    model = llama(2)
    optimizer = optimizer_for(name, model, wrapped)
    return loop(optimizer, DistributedDataParallel(model), share)


def under_fsdp(name):
    model, mesh = llama(2), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return loop(optimizer_for(name, model), model, share)


def under_zero(name, stage, zero_init=False):
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    model = llama(2)
    if zero_init:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    optimizer = optimizer_for(name, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        engine.backward(engine(input_ids=share(step), labels=share(step)).loss)
        engine.step()
    found = {}
    for key, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext():
            found[key] = p.detach().clone()
    count = held(optimizer)
    engine.destroy()
    return found, count


LAYOUTS = {
    "ddp": under_ddp,
    "zero redundancy": lambda name: under_ddp(name, wrapped=True),
    "fsdp2": under_fsdp,
    **{f"zero{stage}": lambda name, stage=stage: under_zero(name, stage) for stage in (1, 2, 3)},
    "zero3 split first": lambda name: under_zero(name, 3, zero_init=True),
}


def measure(cells):
    """Of each (method, layout): whether the weights that moved are those that one process moves; the largest distance
    of a parameter from that of one process, over its movement; and how many weights have moments, over those there."""
    start()
    told = []
    for name, layout in cells:
        model = llama(2)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        alone, of_one = loop(optimizer_for(name, model), model, tokens)
        split, count = LAYOUTS[layout](name)
        total = torch.tensor(float(count))
        dist.all_reduce(total)
        moved = {key: alone[key] != p for key, p in before.items()}
        same = all(torch.equal(split[key] != p, moved[key]) for key, p in before.items())
        trained = [key for key, there in moved.items() if there.any()]
        gaps = [(split[key] - alone[key]).norm() / (alone[key] - before[key]).norm() for key in trained]
        told.append((same, max(float(gap) for gap in gaps), float(total) / of_one))
    return told


def saved(folder):
    """The delta of a model that FSDP2 splits, saved by every process together."""
    start()
    model, mesh = llama(2), init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_for("s2ft", model)
    whole, _ = loop(optimizer, model, share)
    save_delta(model, llama(2), folder)
    dist.barrier()
    return whole
