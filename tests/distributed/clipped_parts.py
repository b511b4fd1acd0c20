"""Clipping in two backward passes on the processes of a pool's job, beside ``clip_grad_norm_`` and an ordinary step."""

import contextlib

import cells
import released_ddp_parts
import released_parts
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gracile.optim import keep_out_of_ddp, release_gradients
from gracile.optim.released import is_freed

CLIP = 0.05
STEPS = 12


class Failure(Exception):
    pass


def built(cell, layout, released):
    """A model, its optimizer, and what frees gradients, if they are."""
    net = released_parts.split(cell) if layout == "fsdp2" else cells.build(cell)
    optimizer = cells.make_optimizer(net, cell)
    if layout == "ddp" and released:
        keep_out_of_ddp(net, optimizer, "nothing")
    model = DistributedDataParallel(net) if layout == "ddp" else net
    return net, model, optimizer, release_gradients(model, optimizer, "nothing") if released else None


def trained(cell, layout, released, failing=()):
    """Whole weights and norms. The loss of step 5 is infinite; before those of ``failing`` a pass fails, the first or
    the second of its step."""
    net, model, optimizer, freed = built(cell, layout, released)
    norms = []
    for step in range(STEPS):

        def closure(step=step):
            loss = model(*cells.share(step, 0)) * (torch.inf if step == 5 else 1)
            loss.backward()
            return loss

        if step in failing:
            fail(net, model, freed, failing[step])
            optimizer.zero_grad()
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


def fail(net, model, freed, at):
    """A pass that fails on all processes, after some of its gradients have come; after the second weights differ."""
    passes = 0
    before = [p.detach().clone() for p in net.parameters()]

    def raises(_):
        if passes == at:
            raise Failure

    def closure():
        nonlocal passes
        passes += 1
        handle = net.square.register_forward_hook(lambda module, given, made: made.register_hook(raises) and None)
        loss = model(*cells.share(20, 0))
        handle.remove()
        loss.backward()

    with contextlib.suppress(Failure):
        freed.clipped_backward(closure, CLIP)
        raise AssertionError("no pass has failed")
    assert all(map(torch.equal, before, net.parameters())) == (at == 1)


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
    """How far weights are after a first pass that failed from those of a run without, under DDP; after a second one
    replicas agree."""
    released_ddp_parts.start()
    cell = {"optimizer": "GaLoreAdamW"}
    one, other = (trained(cell, "ddp", True, failing)[0] for failing in ({}, {3: 1, 7: 1}))
    trained(cell, "ddp", True, {4: 2})
    return released_ddp_parts.apart(one, other)
