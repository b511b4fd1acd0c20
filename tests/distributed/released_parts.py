"""FSDP2 with gradients that are freed in backward, beside an ordinary step, on the processes of a pool's job."""

import cells
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gracile.optim import release_gradients
from gracile.optim.core.projected_gradient import ProjectedGradient, local_of
from gracile.optim.distributed import UnsupportedLayout
from gracile.optim.released import is_freed

STEPS = 20


def split(cell):
    net = cells.build(cell)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (net.tall, net.square):
        fully_shard(module, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def trained(cell, released):
    net = split(cell)
    optimizer = cells.make_optimizer(net, cell)
    if released:
        release_gradients(net, optimizer, keep="nothing")
    for step in range(STEPS):
        net(*cells.share(step, 0)).backward()
        if released:
            assert all(is_freed(p.grad) for p in net.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.full_tensor().clone() if hasattr(p, "full_tensor") else p for name, p in net.named_parameters()}


def compare(tasks):
    """By cell the names of the parameters that differ, at rank 0."""
    cells.start()
    told = {}
    for cell in tasks:
        one, other = trained(cell, False), trained(cell, True)
        told[str(sorted(cell.items()))] = [name for name in one if not torch.equal(one[name], other[name])]
    return told


def projected(cell, keep, passes, clip, told=None, lr_at_first=1.0):
    """Weights after some steps, norms, and whether matrices had coordinates alone between refreshes."""
    net = split(cell)
    optimizer = cells.make_optimizer(net, cell)
    if keep:
        release_gradients(net, optimizer, keep="coordinates", passes=told)
    norms, kept, rates = [], 0, [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * (lr_at_first if step == 0 else 1)
        for micro in range(passes):
            (net(*cells.share(step, micro)) / passes).backward()
        grads = [local_of(p.grad) for p in net.parameters() if p.grad is not None]
        kept = max(kept, sum(isinstance(grad, ProjectedGradient) for grad in grads))
        alone = [grad for grad in grads if not isinstance(grad, ProjectedGradient)]
        assert not keep or all(grad.untyped_storage().nbytes() == grad.nbytes for grad in alone if grad.numel())
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip or torch.inf)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        optimizer.step()
        optimizer.zero_grad()
    whole = [p.full_tensor().clone() if hasattr(p, "full_tensor") else p.detach().clone() for p in net.parameters()]
    return whole, torch.stack(norms), kept


def kept(tasks):
    """By cell how far weights and norms are apart, after one pass a step and after several, clipped in both; and how
    many gradients were coordinates. At rank 0."""
    cells.start()
    told = {}
    for cell in tasks:
        found = []
        for passes, one, lr in ((1, 1, 1.0), (1, None, 0.0), (3, None, 1.0)):
            exact = passes == 1
            a, norms, _ = projected(cell, False, passes, 0.05 if exact else 0.0, lr_at_first=lr)
            b, known, count = projected(cell, True, passes, 0.05 if exact else 0.0, one, lr)
            apart = max(((x - y).norm() / x.norm()).item() for x, y in zip(a, b, strict=True))
            found.append([apart, ((known - norms) / norms).abs().max().item(), count])
        told[cell["optimizer"]] = found
    return told


def refusals():
    """What is said to what cannot be released, at rank 0."""
    cells.start()
    cell = {"optimizer": "GaLoreAdamW"}
    said = []
    net = cells.build(cell)
    try:
        release_gradients(net, cells.make_optimizer(net, cell), keep="nothing")  # before fully_shard
    except UnsupportedLayout as error:
        said.append(str(error))
    net = split(cell)
    release_gradients(net, cells.make_optimizer(net, cell), keep="nothing")
    net(*cells.share(0, 0)).backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), torch.inf).full_tensor()
    other = split(cell)
    other(*cells.share(0, 0)).backward()
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(other.parameters(), torch.inf).full_tensor())
    for again in (lambda: torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3), net(*cells.share(1, 0)).backward):
        try:
            again()
        except RuntimeError as error:
            said.append(str(error))
    return said
