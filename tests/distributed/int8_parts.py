"""Weights in 8 bits under FSDP2, of rows that processes divide and that they do not, and under DDP."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gracile.models.int8 import quantize_weights
from gracile.optim import GaLoreAdamW

STEPS, BATCH = 5, 8


def net(rows, dtype, seed=0):
    torch.manual_seed(seed)
    layers = nn.Embedding(rows, 24), nn.Linear(24, rows, bias=False), nn.ReLU(), nn.Linear(rows, 48, bias=False)
    return quantize_weights(nn.Sequential(*layers).to(dtype))


def trained(held, model, own):
    """Losses, and the whole state; the same gradients for all processes, so that they are those of one."""
    ranked = {"params": [held[1].weight, held[3].weight], "rank": 4, "update_proj_gap": 2}
    optimizer = GaLoreAdamW([ranked, {"params": [held[0].weight]}], lr=0.01, stochastic_rounding=True)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(0, 20, (BATCH,), generator=torch.Generator().manual_seed(step))
        loss = model(ids[own]).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in held.state_dict().items()}
    return losses, {key: value.tolist() for key, value in state.items()}


def measure():
    dist.init_process_group("gloo")
    size, found = dist.get_world_size(), {}
    for rows in (32, 31):
        for dtype in (torch.float32, torch.bfloat16):
            split = net(rows, dtype)
            for layer in (split[0], split[1], split[3], split) if size > 1 else ():
                fully_shard(layer, mesh=init_device_mesh("cpu", (size,)))
            found[f"FSDP2 {rows} {dtype}"] = trained(split, split, slice(None))
    replica = net(32, torch.float32)
    wrapped = DistributedDataParallel(replica) if size > 1 else replica
    found["DDP"] = trained(replica, wrapped, slice(None))
    dtype = torch.bfloat16  # what was trained is sent without being rounded again
    start = net(32, dtype)
    trained(start, start, slice(None))
    before = [p.codes.clone() for p in start.parameters()]
    if size > 1:
        DistributedDataParallel(start)
    found["kept"] = all(torch.equal(p.codes, codes) for p, codes in zip(start.parameters(), before, strict=True))
    return found


def apart():
    """What a process says whose weights are others than those of the first."""
    dist.init_process_group("gloo")
    try:
        DistributedDataParallel(net(32, torch.float32, seed=dist.get_rank()))
        told = ""
    except RuntimeError as error:
        told = str(error)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, told)
    return every
