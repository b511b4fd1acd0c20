"""Save and load FSDP2 runs through torch.distributed.checkpoint, on the processes of a pool's job.

``save``: half a run, a checkpoint, the rest, and once more from the checkpoint. ``load``: the rest alone.
"""

import cells
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gracile import optim

HALF, STEPS = 4, 8  # refreshes at 0, 3 and 5, 6


class Large(nn.Module):
    """Moments that 8 bits are worth it for: 4096 elements in each part, or in all but the last. And one number, which
    one process has all of."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(37, 130)
        self.tall = nn.Linear(130, 402)
        self.wide = nn.Linear(402, 130, bias=False)
        self.square = nn.Linear(130, 130, bias=False)
        self.head = nn.Linear(130, 37, bias=False)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x, y):
        h = self.embed(x)
        for layer in (self.tall, self.wide, self.square):
            h = torch.tanh(layer(h))
        return nn.functional.cross_entropy((self.factor * self.head(h)).flatten(0, 1), y.flatten())


def large_optimizer(net):
    ranked = {"update_proj_gap": cells.GAP, "weight_decay": 0.1}
    groups = [
        {"params": [net.tall.weight, net.wide.weight], "rank": 64, **ranked},
        {"params": [net.square.weight], "rank": 128, **ranked},
        {"params": [net.embed.weight, net.tall.bias, net.head.weight, net.factor]},
    ]
    return optim.GaLoreAdamW8bit(groups, lr=1e-3, eps=1e-6)


def made(cell, seed):
    if cell.get("large"):
        torch.manual_seed(seed)
        return Large(), large_optimizer
    return cells.build(cell, seed), lambda net: cells.make_optimizer(net, cell)


def split(cell, seed=0):
    net, optimizer_for = made(cell, seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (net.tall, net):
        fully_shard(module, mesh=mesh)
    return net, optimizer_for(net)


def train(net, optimizer, first, last, batch=cells.share):
    for step in range(first, last):
        net(*batch(step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()


def resume(cell, folder):
    """Into a model of other weights, from the checkpoint to the end."""
    net, optimizer = split(cell, seed=1)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    saved = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    kept = taken(saved["optimizer"], get_optimizer_state_dict(net, optimizer))
    train(net, optimizer, HALF, STEPS)
    return net, optimizer, kept


def taken(saved, held):
    """The largest distance of a tensor of the state from what was saved, relative to its norm."""
    gaps = [0.0]
    for name, state in saved["state"].items():
        assert state.keys() == held["state"][name].keys()
        for key, value in state.items():
            both = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (value, held["state"][name][key])]
            one, other = (torch.nan_to_num(t.double()) for t in both)
            gaps.append((torch.linalg.vector_norm(one - other) / (torch.linalg.vector_norm(one) + 1e-30)).item())
    return max(gaps)


def save(cell, folder):
    net, optimizer = split(cell)
    get_optimizer_state_dict(net, optimizer)  # makes state by a step of zeros, which must leave no trace
    train(net, optimizer, 0, HALF)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    train(net, optimizer, HALF, STEPS)
    return net, optimizer


def alone(cell):
    net, optimizer_for = made(cell, 0)
    before = cells.weights_of(net)
    train(net, optimizer_for(net), 0, STEPS, batch=cells.batch)
    return before, cells.weights_of(net)


def tensors(net, optimizer):
    """What this process holds of weights and state, in a fixed order."""
    held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    weights = [p.to_local() for p in net.parameters()]
    return weights + [optimizer.state[p][key] for p in held for key in sorted(optimizer.state[p])]


def equal(a, b):
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)  # what Q-GaLore has not measured yet is nan


def same_bits(one, other):
    pairs = zip(tensors(*one), tensors(*other), strict=True)
    flag = torch.tensor(float(all(a.dtype == b.dtype and equal(a, b) for a, b in pairs)))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def apart(net, cell):
    """How far the run is from that of one process, of the weights and of how far they moved."""
    full = {name: p.full_tensor().detach() for name, p in net.named_parameters()}
    if dist.get_rank() != 0:
        return {}
    before, after = alone(cell)
    gaps = {name: torch.linalg.vector_norm(full[name] - after[name]).item() for name in after}
    moved = {name: torch.linalg.vector_norm(after[name] - before[name]).item() for name in after}
    return {
        "difference": max(gap / torch.linalg.vector_norm(after[name]).item() for name, gap in gaps.items()),
        "of_movement": max(gap / moved[name] for name, gap in gaps.items() if moved[name] > 0),
    }


def run(cell, folder, task):
    if task == "load":
        net, _, kept = resume(cell, folder)
        return {"kept": kept} | apart(net, cell)
    undisturbed = save(cell, folder)
    *again, kept = resume(cell, folder)
    plain = all(type(value) is torch.Tensor for value in tensors(*again))
    return {"kept": kept, "plain": plain, "same_bits": same_bits(undisturbed, again)} | apart(undisturbed[0], cell)


def measure(todo, folder, task):
    dist.init_process_group("gloo")
    return [run(cell, f"{folder}/{i}", task) for i, cell in enumerate(todo)]
