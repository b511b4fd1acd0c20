"""Replicas that are built with weights of their own, as DistributedDataParallel allows; weights decide masks."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gracile.optim import RigLAdamW, SparseAdamW

STEPS = 5
MADE = {
    "lamp": lambda p: SparseAdamW(p, density=0.3, distribution="lamp", update_every=2, t_end=20),
    "global": lambda p: SparseAdamW(p, density=0.3, distribution="global", update_every=2, t_end=20),
    "magnitude": lambda p: RigLAdamW(p, density=0.3, init="magnitude", update_every=2, t_end=20),
}


def trained(make):
    """All weights and places after some steps, of this process."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 9, bias=False))
    net[0].weight.data.mul_(1 + 3 * rank)  # another matrix has the largest
    optimizer = make(net.parameters())
    model = DistributedDataParallel(net)
    for t in range(STEPS):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(10 * t + rank))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    places = [optimizer.state[p]["indices"].tolist() for p in net.parameters()]
    return [p.tolist() for p in net.parameters()], places


def measure():
    dist.init_process_group("gloo")
    told = {}
    for name, make in MADE.items():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, trained(make))
        told[name] = {"same": all(one == found[0] for one in found), "counts": [len(own) for own in found[0][1]]}
    return told
