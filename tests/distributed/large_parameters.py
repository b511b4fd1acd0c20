"""Parameters that move in pieces and as a whole, under FSDP2."""

from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from gracile import optim
from gracile.optim.core import optimizer as core

BF16 = torch.bfloat16
SHAPES = [(101, 90), (7, 700), (30,)]  # rows that are no multiple of the processes, nor of a block
CASES = {
    "AdamW": (optim.GaLoreAdamW, torch.float32, {}),
    "8 bits": (optim.GaLoreAdamW8bit, torch.float32, {}),
    "by chance": (optim.GaLoreAdamW, BF16, {"stochastic_rounding": True, "state_dtype": BF16}),
}


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.held = nn.ParameterList(nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES)


def trained(cls, dtype, keys):
    """This process's weights and state after some steps, and how many writes they took."""
    net = Net(dtype)
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = cls(
        [{"params": [nn.Parameter(torch.zeros(4, 4))], "rank": 2}, {"params": list(net.held)}], lr=0.1, **keys
    )
    writes, write = [], core.FullShard.write
    with patch.object(core.FullShard, "write", lambda shard, *a: (writes.append(shard), write(shard, *a))):
        for t in range(3):
            generator = torch.Generator().manual_seed(100 + t)
            for p in net.held:
                p.grad = distribute_tensor(
                    torch.randn(p.shape, generator=generator).to(dtype), p.device_mesh, p.placements
                )
            optimizer.step()
    held = [p.to_local() for p in net.held]
    return [*held, *(value for p in net.held for value in optimizer.state[p].values())], len(writes)


def measure():
    dist.init_process_group("gloo")
    told = {}
    for name, case in CASES.items():
        whole, _ = trained(*case)
        with patch.object(core, "at_once", lambda device: 512):
            parts, writes = trained(*case)
        apart = torch.tensor([sum(not torch.equal(a, b) for a, b in zip(whole, parts, strict=True))])
        dist.all_reduce(apart)
        told[name] = int(apart), writes
    return told
