"""A plain script with accelerate: ``prepare`` splits the model and swaps the parameters of its optimizer."""

import gc
import weakref

import cells
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from fsdp_on_cpu import split_on_cpus
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gracile.optim.distributed import UnsupportedLayout

CELL = {"optimizer": "GaLoreAdamW", "proj_type": "left"}
PLACED = {"optimizer": "APOLLOAdamW"}  # draws its projections by a parameter's place
HALF, STEPS = 8, 16


def prepared(accelerator, seed=0):
    net = cells.build(CELL)
    torch.manual_seed(seed)
    for p in net.parameters():
        p.data += seed * torch.randn(p.shape)
    return accelerator.prepare(net, cells.make_optimizer(net, CELL))


def train(accelerator, net, optimizer, first, last, batch=cells.share):
    for step in range(first, last):
        accelerator.backward(net(*batch(step, 0)))
        optimizer.step()
        optimizer.zero_grad()


def whole(net):
    return {name: p.full_tensor().detach().clone() for name, p in net.named_parameters()}


def apart(one, other):
    return max((torch.linalg.vector_norm(one[n] - other[n]) / torch.linalg.vector_norm(other[n])).item() for n in other)


def alone(accelerator, cell):
    net = cells.build(CELL)
    train(accelerator, net, cells.make_optimizer(net, cell), 0, STEPS, batch=cells.batch)
    return cells.weights_of(net)


def originals_left(accelerator):
    """How many of the parameters that the optimizer was built with are still in memory after ``prepare``."""
    net = cells.build(CELL)
    optimizer = cells.make_optimizer(net, CELL)
    left = [weakref.ref(p) for p in net.parameters()]
    both = accelerator.prepare(net, optimizer)
    gc.collect()
    assert both[1].optimizer is optimizer
    return sum(reference() is not None for reference in left)


def stopped_and_resumed(accelerator, reference, folder):
    """How far an undisturbed run is from one process, and whether a resumed one is that run to the bit."""
    net, optimizer = prepared(accelerator)
    train(accelerator, net, optimizer, 0, HALF)
    accelerator.save_state(folder)
    train(accelerator, net, optimizer, HALF, STEPS)
    undisturbed = whole(net)
    accelerator.free_memory()
    net, optimizer = prepared(accelerator, seed=1)
    accelerator.load_state(folder)
    train(accelerator, net, optimizer, HALF, STEPS)
    resumed = whole(net)
    accelerator.free_memory()
    same = all(torch.equal(resumed[name], value) for name, value in undisturbed.items())
    return {"difference": apart(undisturbed, reference), "same_bits": same}


def split_later(swap):
    """The optimizer is built first, then torch splits the model; ``swap`` brings the DTensors into its groups."""
    net = cells.build(CELL)
    optimizer = cells.make_optimizer(net, PLACED)
    before = dict(net.named_parameters())
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    swap(optimizer, {id(before[name]): p for name, p in net.named_parameters()})
    return net, optimizer


def in_its_list(optimizer, became):
    for group in optimizer.param_groups:
        group["params"][:] = [became[id(p)] for p in group["params"]]


def in_a_new_list(optimizer, became):
    for group in optimizer.param_groups:
        group["params"] = [became[id(p)] for p in group["params"]]


def in_another_order(optimizer, became):
    in_a_new_list(optimizer, became)
    optimizer.param_groups[0]["params"].reverse()


def refusal(act):
    try:
        act()
    except UnsupportedLayout as error:
        return str(error)
    return None


def with_state(accelerator):
    net = cells.build(CELL)
    optimizer = cells.make_optimizer(net, CELL)
    train(accelerator, net, optimizer, 0, 1, batch=cells.batch)
    train(accelerator, *accelerator.prepare(net, optimizer), 1, 2)


def measure(folder):
    split_on_cpus()
    told = {}
    for form in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=1000, state_dict_type=form
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        assert accelerator.is_fsdp2
        accelerator.state.fsdp_plugin = plugin  # a process has one state, the first accelerator's
        told[form] = stopped_and_resumed(accelerator, alone(accelerator, CELL), f"{folder}/{form}")
    told["originals_left"] = originals_left(accelerator)
    reference = alone(accelerator, PLACED)
    for swap in (in_its_list, in_a_new_list):
        net, optimizer = split_later(swap)
        train(accelerator, net, optimizer, 0, STEPS)
        told[swap.__name__] = apart(whole(net), reference)
    net, optimizer = split_later(in_another_order)
    told["in_another_order"] = refusal(lambda: train(accelerator, net, optimizer, 0, 1))
    told["with_state"] = refusal(lambda: with_state(accelerator))
    return told
