"""Clipping in two backward passes on the processes of a pool's job, beside ``clip_grad_norm_`` and an ordinary step."""

import contextlib

import cells
import released_ddp_parts
import released_parts
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gracile.optim import keep_out_of_ddp, release_gradients
from gracile.optim.released import is_freed

CLIP = 0.05
STEPS = 12


def built(cell, layout, released):
    """A model, its optimizer, and what frees gradients, if they are."""
    net = released_parts.split(cell) if layout == "fsdp2" else cells.build(cell)
    optimizer = cells.make_optimizer(net, cell)
    if layout == "ddp" and released:
        keep_out_of_ddp(net, optimizer, "nothing")
    model = DistributedDataParallel(net) if layout == "ddp" else net
    return net, model, optimizer, release_gradients(model, optimizer, "nothing") if released else None


def trained(cell, layout, released):
    """Whole weights and norms. The loss of step 5 is infinite."""
    net, model, optimizer, freed = built(cell, layout, released)
    norms = []
    for step in range(STEPS):

        def closure(step=step):
            loss = model(*cells.share(step, 0)) * (torch.inf if step == 5 else 1)
            loss.backward()
            return loss

        if freed is not None:
            _, norm = freed.clipped_backward(closure, CLIP)
            owned = sum(p.grad is not None and not is_freed(p.grad) for p in net.parameters())
            assert owned == (layout == "ddp" and step != 5)
        else:
            closure()
            norm = nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norms.append(norm)
        if norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in net.parameters()]
    assert layout == "fsdp2" or released_ddp_parts.agree(whole)
    assert released_ddp_parts.agree(norms[:5])
    return [p.clone() for p in whole], torch.stack(norms)


def compare(tasks):
    """By cell and layout how far weights and norms are from those of an ordinary run, at rank 0."""
    released_ddp_parts.start()
    told = {}
    for name, layout in tasks:
        cell = {"optimizer": name}
        (one, norms), (other, found) = (trained(cell, layout, released) for released in (False, True))
        assert norms[0] > CLIP
        kept = torch.arange(STEPS) != 5
        assert norms.isfinite().tolist() == found.isfinite().tolist() == kept.tolist()
        off = ((found - norms) / norms)[kept].abs().max().item()
        told[f"{name} {layout}"] = released_ddp_parts.apart(one, other), off
    return told


def failures():
    """How far weights are after passes that failed from those of a run without, at rank 0; by which pass of a step."""
    released_ddp_parts.start()
    return {at: released_ddp_parts.apart(clipped_and_failed(None), clipped_and_failed(at)) for at in (1, 2)}


def clipped_and_failed(at):
    net = released_ddp_parts.Net(bias=False)
    optimizer = released_ddp_parts.galore(net)
    keep_out_of_ddp(net, optimizer, "nothing")
    ddp = DistributedDataParallel(net)
    freed = release_gradients(ddp, optimizer, "nothing")
    for step in range(6):
        if step in (3, 4) and at is not None:
            fail(net, ddp, freed, at)
            optimizer.zero_grad()
            assert released_ddp_parts.agree(net.parameters())

        def closure(step=step):
            released_ddp_parts.loss_of(ddp, step).backward()

        freed.clipped_backward(closure, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        assert released_ddp_parts.agree(net.parameters())
    return [p.detach().clone() for p in net.parameters()]


def fail(net, ddp, freed, at):
    """The first or the second pass of a step fails, at another place on each process."""
    places = [None] * (at - 1) + [("first", "third")[dist.get_rank() % 2]]
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        net.fails_at = places.pop(0)
        released_ddp_parts.loss_of(ddp, 20).backward()

    with contextlib.suppress(released_ddp_parts.Failure):
        freed.clipped_backward(closure, CLIP)
    assert not places
    net.fails_at = None
    assert all(map(torch.equal, before, net.parameters())) == (at == 1)
