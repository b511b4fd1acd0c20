"""Runs that go on from every form in which torch.distributed.checkpoint has state, on the processes of a pool's job.

A form says how state is saved and loaded: nested or flattened through files, full on every process, or full on process
0 alone, which sends the others theirs. Each goes into objects that have made no step.
"""

import cells
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp_checkpoints import HALF, made, split, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

END = HALF + 3  # refreshes at 5 and 6
FORMS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "of process 0": StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
}


def started(cell, seed=0):
    """The wrapped model and its optimizer."""
    if cell["layout"] == "fsdp2":
        return split(cell, seed)
    net, optimizer_for = made(cell, seed)
    return DistributedDataParallel(net), optimizer_for(net)


def saved(run, form, folder):
    """What the processes keep of a run in memory; None where it is in files."""
    model, state = get_state_dict(*run, options=FORMS[form])
    if form in ("nested", "flattened"):
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=f"{folder}/{form}")
        return None
    return copied({"model": model, "optimizer": state})


def load(run, form, folder, kept):
    options = FORMS[form]
    if kept is None:
        model, state = get_state_dict(*run, options=options)
        kept = {"model": model, "optimizer": state}
        dcp.load(kept, checkpoint_id=f"{folder}/{form}")
    # each by itself: set_state_dict would leave out the model where a process has nothing of it
    set_model_state_dict(run[0], kept["model"], options=options)
    set_optimizer_state_dict(*run, kept["optimizer"], options=options)


def copied(nested):
    """torch gives the very tensors that are trained."""
    if isinstance(nested, dict):
        return {key: copied(value) for key, value in nested.items()}
    return nested.clone() if isinstance(nested, torch.Tensor) else nested


def differing(one, other, cell):
    """What is not the same in two runs, on any process: names of weights and keys of state; empty if all is."""
    found = []
    for (name, p), q in zip(one[0].named_parameters(), other[0].parameters(), strict=True):
        a, b = one[1].state.get(p, {}), other[1].state.get(q, {})
        found += [] if same(p, q) else [name]
        found += [f"{name} {key}" for key in sorted(a.keys() ^ b.keys())]
        rounded = cell.get("large")  # moments in 8 bits, which travel in fp32
        found += [f"{name} {key}" for key in sorted(a.keys() & b.keys()) if not (rounded or same(a[key], b[key]))]
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return sorted({name for part in everywhere for name in part})


def same(a, b):
    a, b = (t.to_local() if hasattr(t, "to_local") else t for t in (a.detach(), b.detach()))
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def go_on(cell, folder):
    """By form, what differs from the undisturbed run right after loading and at its end, or the error."""
    forms = cell.get("forms", FORMS)
    undisturbed = started(cell)
    train(*undisturbed, 0, HALF)
    kept = {form: saved(undisturbed, form, folder) for form in forms}
    resumed, told = {}, {}
    for form in forms:
        resumed[form] = started(cell, seed=1)
        error = raised_by(lambda form=form: load(resumed[form], form, folder, kept[form]))
        told[form] = error or differing(undisturbed, resumed[form], cell)
    train(*undisturbed, HALF, END)
    for form in forms:
        if not told[form]:
            train(*resumed[form], HALF, END)
            told[form] = [] if cell.get("large") else differing(undisturbed, resumed[form], cell)
    return told


def raised_by(action):
    """The error of ``action``, whichever process it is on."""
    error = []
    try:
        action()
    except BaseException as refusal:  # torch's CheckpointException is no Exception
        error = [f"{type(refusal).__name__}: {str(refusal).strip().splitlines()[-1]}"]
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, error)
    return next((found for found in everywhere if found), [])


def measure(todo, folder):
    cells.start()
    return [go_on(cell, f"{folder}/{i}") for i, cell in enumerate(todo)]
