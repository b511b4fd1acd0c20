"""Adapters of every method under DDP, FSDP2 and DeepSpeed, beside one process that sees the same tokens."""

import contextlib

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from adapted import attached
from cells import start
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gracile import adapters

STEPS, BATCH, LENGTH = 4, 8, 12


def tokens(step):
    return torch.randint(3, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def share(step):
    size = BATCH // dist.get_world_size()
    return tokens(step)[dist.get_rank() * size :][:size]


def adapted(name):
    name, _, gated = name.partition(", ")
    model = attached(name, **({"gradient_dropout": 1.0} if gated == "gated" else {})).train()
    if gated == "gated":
        spread(model)
    for p in model.parameters():  # as they are without an adapter's own dtype or frozen parts to be left out
        p.data = p.data.contiguous()
    return model


def spread(model):
    """Scores some of which are off: at first nothing is far from the base."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained_of(model):
            p.mul_(0.25 + torch.rand(p.shape, generator=generator))


def trained_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def optimizer_for(model):
    return torch.optim.AdamW(trained_of(model), lr=3e-3, eps=1e-4)  # no signs of gradients that are rounding


def own_loss(model, x):
    """Computed beside the model, with the terms of its adapters."""
    outputs = model(input_ids=x)
    loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    return adapters.with_penalty(model, loss, outputs, x)


def loss_of(model, x):
    return model(input_ids=x, labels=x).loss


def loop(model, batch, loss=loss_of, passes=1):
    optimizer = optimizer_for(model)
    for step in range(STEPS):
        for part in batch(step).chunk(passes):
            (loss(model, part) / passes).backward()
        optimizer.step()
        optimizer.zero_grad()
    named = [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in named}
    return {name: p.detach().clone() for name, p in whole.items()}


def under_ddp(name, *how):
    return loop(DistributedDataParallel(adapted(name)), share, *how)


def under_fsdp(name, *how):
    model, mesh = adapted(name), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return loop(model, share, *how)


def under_zero(name, stage, loss=loss_of, passes=1):
    model = adapted(name)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size() // passes,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_for(model), config=config)
    for step in range(STEPS):
        for part in share(step).chunk(passes):
            engine.backward(loss(engine, part))
            engine.step()
        if model.base_model.steps < step + 1:  # DeepSpeed's optimizer holds flat copies: as StepCallback does
            model.base_model.step()
    found = {}
    for key, p in engine.module.named_parameters():
        if p.requires_grad:
            with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext():
                found[key] = p.detach().clone()
    engine.destroy()
    return found


LAYOUTS = {
    "ddp": under_ddp,
    "fsdp2": under_fsdp,
    "zero2": lambda name, *how: under_zero(name, 2, *how),
    "zero3": lambda name, *how: under_zero(name, 3, *how),
}


def measure(cells):
    """Of each (method, layout) the largest distance of a parameter from that of one process, over its movement; or the
    line by which the layout is refused."""
    start()
    told = []
    for name, layout in cells:
        own = name.endswith(", own loss")  # in two passes a step, where one process takes one
        name = name.removesuffix(", own loss")
        model = adapted(name)
        before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
        alone = loop(model, tokens)
        try:
            split = LAYOUTS[layout](name, *((own_loss, 2) if own else ()))
        except ValueError as refused:
            told.append(str(refused))
            continue
        gaps = {key: (split[key] - p).norm() / (p - before[key]).norm() for key, p in alone.items()}
        told.append(max(float(gap) for gap in gaps.values()))
    return told
