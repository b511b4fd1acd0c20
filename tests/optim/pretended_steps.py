"""Steps of every variant of the catalogue on the pretended device and on the CPU, as JSON: a process of its own, for
torch does not forget a device. Those that are named, on a device without fp64; by ``all`` also all on one with it."""

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from catalogue import RANKED, VARIANTS
from pretend_device import OnDevice, on_device, pretend

from gracile.models.convert import convert
from gracile.models.layers import OrderedLowRankLinear
from gracile.optim.distributed import ProjectionSide, held_shard
from gracile.optim.low_rank import singular
from gracile.optim.low_rank.cosine import cosine_basis
from gracile.optim.low_rank.first_gradients import FirstGradients
from gracile.optim.sparse.group_envelope import envelope, proximal_factors
from gracile.optim.sparse.layer_budgets import budgets_by_weight

MATRICES, OTHERS = [(24, 16), (16, 24), (32, 32)], [(20, 8), (16,)]
STEPS = 10


def made(variant, device):
    if variant.quadratic is None and variant.layer:
        return made_of_layers(variant, device)
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter(device(0.3 * torch.randn(s, generator=generator))) for s in MATRICES + OTHERS]
    matrices, others = held[: len(MATRICES)], held[len(MATRICES) :]
    keys = variant.quadratic or variant.cells
    own = {**(RANKED if "subspace_method" in (keys.matrices or {}) else {}), **(keys.matrices or {})}
    return held, variant.cls([{"params": matrices, **own}, {"params": others}], **keys.keys)


def made_of_layers(variant, device):
    """Layers of the method and one that stays: their refreshes and merges fall on steps of ``cells``."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 8))
    convert(net, variant.layer.cls, ["0", "1"], rank=4, **variant.layer.keys)
    moved_to(net, device)
    held = [p for p in net.parameters() if p.requires_grad]
    return held, variant.cls([{"params": held}], **variant.cells.keys)


def moved_to(net, device):
    for layer in net.modules():
        for name, p in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(device(p.detach()), requires_grad=p.requires_grad))
        for name, buffer in list(layer.named_buffers(recurse=False)):
            setattr(layer, name, device(buffer))
    return net


def give(held, t, device):
    generator = torch.Generator().manual_seed(100 + t)
    for p in held:
        p.grad = device(torch.randn(p.shape, generator=generator))


def stepped(variant, without_fp64):
    """Waits and launches of each step, how far the weights are from the CPU's, and how far these went."""
    on_host, host = made(variant, torch.clone)
    first = [p.detach().clone() for p in on_host]
    waits, launches = [], []
    with pretend(without_fp64) as record:
        held, optimizer = made(variant, on_device)
        for t in range(STEPS):
            give(on_host, t, torch.clone)
            host.step()
            give(held, t, on_device)
            record.clear()
            optimizer.step()
            waits.append(record.waits + record.copies)
            launches.append(record.launches)
    apart = max(float((p.detach().held - q.detach()).abs().max()) for p, q in zip(held, on_host, strict=True))
    moved = max(float((p - q.detach()).abs().max()) for p, q in zip(first, on_host, strict=True))
    zeros = [[int((p == 0).sum()) for p in weights] for weights in ([p.detach().held for p in held], on_host)]
    askew = max(map(oblique, optimizer.state.values()))
    return {"waits": waits, "launches": launches, "apart": apart, "moved": moved, "zeros": zeros, "oblique": askew}


def oblique(state):
    """How far the columns of a basis are from orthonormal."""
    P = state.get("basis")
    if not isinstance(P, OnDevice) or not P.is_floating_point():
        return 0.0
    return float((P.held.double().mT @ P.held.double() - torch.eye(P.shape[-1])).abs().max())


def of_itself():
    """What the device tells of a few lines of torch."""
    told = {}
    with pretend() as record:
        x = on_device(torch.arange(4.0))
        told["sum"], told["one"] = float(x.sum()), (record.waits.total(), record.launches)
        x[x > 1]
        x.cpu()
        told["three"] = record.waits.total()
        try:
            x + torch.ones(4)
        except RuntimeError as error:
            told["mixed"] = str(error)
    return told


def refused_of_fp64():
    """Of a few lines of torch, which a device without fp64 refuses."""
    lines = {
        "on": lambda x: on_device(torch.ones(4, dtype=torch.float64)),
        "moved on": lambda x: torch.ones(4, dtype=torch.float64).to(x.device),
        "made": lambda x: torch.zeros(4, dtype=torch.float64, device=x.device),
        "cast": lambda x: x.double(),
        "summed": lambda x: x.sum(dtype=torch.float64),
        "moved off and cast": lambda x: x.to("cpu", torch.float64),
        "copied off": lambda x: torch.ones(4, dtype=torch.float64).copy_(x),
        "moved off": lambda x: x.cpu().double(),
        "cast and moved on": lambda x: torch.ones(4, dtype=torch.float64).float().to(x.device) + x,
    }
    refused = []
    with pretend(without_fp64=True):
        x = on_device(torch.arange(4.0))
        for name, line in lines.items():
            found = attempted(lambda: line(x))  # noqa: B023
            if isinstance(found, dict) and "doesn't support float64" in found["refused"]:
                refused.append(name)
    return refused


def computed():
    """Of what computes in fp64 and is not in every step, how far it is from the CPU's on a device without."""
    generator = torch.Generator().manual_seed(3)
    G, H = (torch.randn(40, 24, generator=generator) for _ in range(2))
    side = ProjectionSide.of(tuple(G.shape), 4, "std")
    P = singular.random_columns(side.basis_shape, 1, G)
    v, d = G[0].abs(), H[0].abs() + 0.1
    one_direction, before = torch.outer(G[:, 0], H[:, 0]), singular.random_columns((40, 40), 2, G)

    def ordered(at):
        layer = moved_to(OrderedLowRankLinear(24, 40, rank=4), at)
        layer.factor(at(G))
        return layer.U.detach() @ layer.V.detach().mT

    def seen(at):
        found, p = FirstGradients(), nn.Parameter(at(G))
        found.look_at(at(1e-30 * G), held_shard(p), at(torch.ones(1, dtype=torch.bool)))
        found.note()
        return at(torch.tensor(float(found.missing(held_shard(p).position))))

    functions = {
        "of the Gram matrix": lambda at: singular._by_gram_matrix(at(G), side),
        "a range": lambda at: singular.randomized_range(at(G), side, None, 5),
        "a range again": lambda at: singular.randomized_range(at(G), side, at(P), 5),
        "of one direction": lambda at: singular.orthonormalized(at(one_direction), at(before)),
        "cosines": lambda at: cosine_basis(24, at(G).device),
        "an envelope": lambda at: envelope(at(v), at(d), 7),
        "its map": lambda at: proximal_factors(at(v), at(d), 7, 0.1),
        "LAMP": lambda at: at(torch.tensor(budgets_by_weight([at(G), at(3 * H)], 0.3, "lamp"))),
        "ordered": ordered,
        "a small gradient": seen,
    }
    apart = {}
    for name, function in functions.items():
        expected = function(torch.clone)
        with pretend(without_fp64=True):
            apart[name] = attempted(lambda: float((function(on_device).held - expected).abs().max()))  # noqa: B023
    return apart


def attempted(function):
    """What it finds, or how it is refused."""
    try:
        return function()
    except TypeError as error:
        return {"refused": str(error)}


def told_without_fp64(names):
    cosine_basis.known.clear()
    told = {name: attempted(lambda: stepped(VARIANTS[name], without_fp64=True)) for name in names}  # noqa: B023
    return {"variants": told, "refused": refused_of_fp64(), "computed": computed()}


def told_with_fp64():
    told = {name: stepped(variant, without_fp64=False) for name, variant in VARIANTS.items() if variant.quadratic}
    return {"variants": told, "device": of_itself()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    told = told_with_fp64() if "all" in sys.argv else {}
    told["without fp64"] = told_without_fp64([name for name in sys.argv[1:] if name != "all"])
    print(json.dumps(told))
