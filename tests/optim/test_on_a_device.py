"""A step on a device: no mixing, no waiting between refreshes, the numbers of the CPU. The device is pretended."""

import pytest
import torch
from catalogue import VARIANTS
from pretend_device import on_device, pretend
from torch import nn

MATRICES, OTHERS = [(24, 16), (16, 24), (32, 32)], [(20, 8), (16,)]
STEPS = 10
# Waits and copies from the CPU in the busiest step, for all of three matrices; of what is not here, one.
BUSY = {
    "GaLoreAdamW8bit Q-GaLore": 5,
    "GaLorePlusAdamW": 10,
    "GaLorePlusAdamW heads": 10,
    "APOLLOAdamW svd": 4,
    "SETAdamW": 115,
    "RigLAdamW": 115,
    "SRigLAdamW": 200,
    "SparseAdamW": 115,
    "BlockSparseAdamW": 25,
    "HyperSparseAdamW": 12,
    "HyperSparseAdamW pruned": 12,
}
QUADRATIC = {name: variant for name, variant in VARIANTS.items() if variant.quadratic}


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


@pytest.mark.parametrize("name", QUADRATIC)
def test_a_step_mixes_no_devices_and_waits_at_refreshes_only(name):
    on_host, host = made(QUADRATIC[name], torch.clone)
    waits = []
    with pretend() as record:
        held, optimizer = made(QUADRATIC[name], on_device)
        for t in range(STEPS):
            give(on_host, t, torch.clone)
            host.step()
            give(held, t, on_device)
            record.clear()
            optimizer.step()
            waits.append(record.waits + record.copies)
            assert record.launches
    totals = [where.total() for where in waits]
    assert sum(total > 0 for total in totals[1:]) <= 3, waits  # refreshes on steps 0, 4 and 8, masks after 4 and 8
    assert max(totals[1:]) <= BUSY.get(name, 1), max(waits[1:], key=lambda where: where.total())
    for p, q in zip(held, on_host, strict=True):
        torch.testing.assert_close(p.detach().held, q.detach(), rtol=1e-4, atol=1e-5)


def test_it_tells_what_waits_and_refuses_a_mix():
    with pretend() as record:
        x = on_device(torch.arange(4.0))
        assert float(x.sum()) == 6.0
        assert record.waits.total() == 1
        assert record.launches == 1
        x[x > 1]
        x.cpu()
        assert record.waits.total() == 3
        x[0] = 5.0
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4)
