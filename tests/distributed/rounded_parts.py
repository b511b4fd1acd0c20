"""bf16 weights and moments that are rounded by chance, under FSDP2 and DDP, from the gradients of one process."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gracile import optim

STEPS = 7
SHAPES = [(24, 10), (10, 30), (13,)]
KEYS = {"stochastic_rounding": True, "state_dtype": torch.bfloat16, "lr": 1e-3}
RANKED = {"rank": 3, "update_proj_gap": 3, "proj_type": "right"}
MADE = {
    "Lion": lambda ps: optim.Lion(ps, **KEYS),
    "GaLoreAdamW": lambda ps: optim.GaLoreAdamW([{"params": ps[:2], **RANKED}, {"params": ps[2:]}], **KEYS),
    "RigLAdamW": lambda ps: optim.RigLAdamW(
        [{"params": ps[:2], "sparsity": 0.5}, {"params": ps[2:]}], update_every=3, t_end=9, **KEYS
    ),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.held = nn.ParameterList(
            nn.Parameter((0.3 * torch.randn(s, generator=generator)).to(torch.bfloat16)) for s in SHAPES
        )


def trained(make, split):
    """Whole weights after some steps."""
    net = Net()
    if split:
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    held = list(net.held)
    optimizer = make(held)
    for t in range(STEPS):
        generator = torch.Generator().manual_seed(100 + t)
        for p in held:
            G = torch.randn(p.shape, generator=generator).to(torch.bfloat16)
            p.grad = distribute_tensor(G, p.device_mesh, p.placements) if isinstance(p, DTensor) else G
        optimizer.step()
    return [(p.full_tensor() if isinstance(p, DTensor) else p).float().tolist() for p in held]


def measure():
    dist.init_process_group("gloo")
    return {name: {"split": trained(make, True), "replica": trained(make, False)} for name, make in MADE.items()}
