"""torch's ZeroRedundancyOptimizer beside the same optimizer under DistributedDataParallel, on a pool's job.

Gradients are the same bits in both, so weights must be, too: before the first step, after each, and when the run goes
on from a consolidated state, in either.
"""

from functools import partial

import cells
import torch
import torch.distributed as dist
from catalogue import VARIANTS
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

HALF, STEPS = 7, 11  # refreshes at 0, 3, 5, 6, 9 and 10, masks at 4 and 8


def started(cell, split):
    net, kind = cells.build(cell), VARIANTS[cell["optimizer"]].cls
    if split:
        kind = partial(
            ZeroRedundancyOptimizer, optimizer_class=kind, parameters_as_bucket_view=cell.get("buckets", False)
        )
    model = DistributedDataParallel(net)
    return model, cells.make_optimizer(net, cell, construct=partial(kind, **cell.get("defaults", {})))


def train(run, first, last):
    model, optimizer = run
    for step in range(first, last):
        model(*cells.share(step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()


def agree(*runs):
    """Whether the weights of all runs on all processes are the same bits."""
    found = [p.detach() for run in runs for p in run[0].parameters()]
    count = len(found) // len(runs)
    same = all(torch.equal(found[i % count], p) for i, p in enumerate(found))
    for p in found[:count]:
        first = p.clone()
        dist.broadcast(first, 0)
        same &= torch.equal(first, p)
    flag = torch.tensor(float(same))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def go_on(cell):
    """Where the two are not the same, or the refusal."""
    try:
        runs = started(cell, split=False), started(cell, split=True)
    except RuntimeError as refusal:
        return str(refusal)
    if not agree(*runs):
        return "before the first step"
    for step in range(HALF):
        for run in runs:
            train(run, step, step + 1)
        if not agree(*runs):
            return f"after step {step}"
    whole, split = runs
    split[1].consolidate_state_dict(0)
    sent = [split[1].state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent)
    resumed = started(cell, split=False), started(cell, split=True)  # it changes what it loads, so it comes last
    for model, optimizer in resumed:
        model.load_state_dict(split[0].state_dict())
        optimizer.load_state_dict(sent[0])
    for run in (whole, *resumed):
        train(run, HALF, STEPS)
    return "" if agree(whole, *resumed) else "after loading"


def measure(todo):
    cells.start()
    return [go_on(cell) for cell in todo]
