"""What galore-torch and apollo-torch saved, taken over in layouts that split it. ``test_published.py`` runs it."""

import apollo_torch
import galore_torch
import torch
import torch.distributed as dist
from cells import batch, build, make_optimizer, replicated, start, zero
from torch.distributed.fsdp import fully_shard

from gracile import optim

THEIRS = {"GaLoreAdamW": galore_torch.GaLoreAdamW, "APOLLOAdamW": apollo_torch.APOLLOAdamW}
GROUP_KEYS = ("rank", "update_proj_gap", "scale", "proj_type", "proj", "scale_type", "weight_decay")
STEPS = 7  # past the refreshes at 3, 5 and 6


def published(cell, path):
    """A file as their scripts write it, and the state of one process that has loaded it."""
    net = build(cell)
    ours = make_optimizer(net, cell, together=False)
    groups = [
        {"params": group["params"], **{key: group[key] for key in GROUP_KEYS if group["rank"] and key in group}}
        for group in ours.param_groups
    ]
    theirs = THEIRS[cell["optimizer"]](groups, lr=0.01, no_deprecation_warning=True)
    for step in range(STEPS):
        net(*batch(step, 0)).backward()
        theirs.step()
        theirs.zero_grad()
    torch.save({"model": net.state_dict(), "optimizer": theirs.state_dict()}, path)
    ours.load_state_dict(theirs.state_dict())
    return optim.full_state(ours)["parameters"]


def refusal(cell, path):
    """What ``load_state_dict`` says where parameters are split."""
    net = fully_shard(build(cell))
    try:
        make_optimizer(net, cell).load_state_dict(optim.read_published(path)["optimizer"])
    except ValueError as error:
        return str(error)


def taken_over(cells, folder):
    """Of each cell, by parameter and key, whether the state put together again is that of one process."""
    start()
    told = []
    for number, cell in enumerate(cells):
        path, copy = f"{folder}/{number}.pt", f"{folder}/{number}_full.pt"
        expected = published(cell, path) if dist.get_rank() == 0 else {}
        dist.barrier()
        cell = {**cell, "load": path, "save": copy, "steps": [STEPS, STEPS], "watched": False}
        (replicated if cell["layout"] == "fsdp2" else zero)(cell)
        saved = torch.load(copy, weights_only=True)["optimizer"]["parameters"]
        same = {
            position: {key: torch.equal(value, saved[position][key]) for key, value in state.items()}
            for position, state in expected.items()
        }
        told.append({"same": same, "refused": refusal(cell, path) if cell["layout"] == "fsdp2" else None})
    return told
