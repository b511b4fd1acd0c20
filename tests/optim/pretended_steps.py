"""Steps of every variant of the catalogue on the pretended device and on the CPU, as JSON: a process of its own, for
torch does not forget a device."""

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from catalogue import VARIANTS
from pretend_device import on_device, pretend

MATRICES, OTHERS = [(24, 16), (16, 24), (32, 32)], [(20, 8), (16,)]
STEPS = 10


def made(variant, device):
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter(device(0.3 * torch.randn(s, generator=generator))) for s in MATRICES + OTHERS]
    matrices, others = held[: len(MATRICES)], held[len(MATRICES) :]
    keys = variant.quadratic
    return held, variant.cls([{"params": matrices, **(keys.matrices or {})}, {"params": others}], **keys.keys)


def give(held, t, device):
    generator = torch.Generator().manual_seed(100 + t)
    for p in held:
        p.grad = device(torch.randn(p.shape, generator=generator))


def stepped(variant):
    """Waits and launches of each step, and how far the weights are from the CPU's."""
    on_host, host = made(variant, torch.clone)
    waits, launches = [], []
    with pretend() as record:
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
    return {"waits": waits, "launches": launches, "apart": apart}


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


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    told = {name: stepped(variant) for name, variant in VARIANTS.items() if variant.quadratic}
    print(json.dumps({"variants": told, "device": of_itself()}))
