"""A large parameter moves in pieces to the bits of one that moves as a whole, in the memory of a piece."""

import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

from gracile import optim
from gracile.optim.core import optimizer as core
from gracile.optim.distributed import FlatShard, ShardRange, Workspace, pieces_of
from gracile.optim.distributed.process_group import FakeGroup
from gracile.train.measurement.fake_pass import Ledger

BF16 = torch.bfloat16
SHAPE = (300, 101)
CASES = {
    "AdamW": (optim.GaLoreAdamW, torch.float32, {"maximize": True}),
    "Lion": (optim.Lion, torch.float32, {"weight_decay": 0.1}),
    "8 bits": (optim.GaLoreAdamW8bit, torch.float32, {}),
    "by chance": (optim.GaLoreAdamW, BF16, {"stochastic_rounding": True, "state_dtype": BF16}),
    "Adafactor": (optim.GaLoreAdafactor, torch.float32, {"relative_step": False, "lr": 0.1}),
    "masks": (optim.RigLAdamW, BF16, {}),
}


def trained(case, transposed=False):
    cls, dtype, keys = CASES[case]
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(SHAPE, generator=generator).to(dtype)
    p = nn.Parameter(p.t().contiguous().t() if transposed else p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no group of matrices
        optimizer = cls([p], **{"lr": 0.1, **keys})
        for _ in range(4):
            p.grad = torch.randn(SHAPE, generator=generator).to(dtype)
            optimizer.step()
    return [p.detach(), *optimizer.state[p].values()]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_pieces_have_the_bits_of_the_whole(case, transposed, monkeypatch):
    whole = trained(case, transposed)
    monkeypatch.setattr(core, "at_once", lambda device: 1024)
    steps = []
    write = core.FullShard.write
    monkeypatch.setattr(core.FullShard, "write", lambda shard, *a: (steps.append(shard), write(shard, *a)))
    parts = trained(case, transposed)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    in_pieces = case != "Adafactor" and not transposed  # whose rows and columns are of all elements
    assert len(steps) == 4 * (30 if in_pieces else 1)


@pytest.mark.parametrize(
    "bounds", [(0, 5000, 5000, 30000, 30300), (0, 1000, 2000, 3000, 30300), (0, 7575, 15150, 30300)]
)
def test_every_process_has_as_many_pieces_and_together_all_elements(bounds):
    own = [torch.arange(a, b) for a, b in pairwise(bounds)]
    cut = []
    for index, part in enumerate(own):
        held = ShardRange((300, 101), bounds, 0, FakeGroup(index, len(own)))
        cut.append(list(pieces_of(FlatShard(part, part, held, 0, Workspace()), 4096)))
    assert {len(parts) for parts in cut} == {-(-30300 // 4096)}
    for number, parts in enumerate(zip(*cut, strict=True)):
        elements = torch.cat([shard.parameter for shard, _, _ in parts])
        assert torch.equal(elements, torch.arange(number * 4096, min(number * 4096 + 4096, 30300)))
        for (shard, begin, end), part in zip(parts, own, strict=True):
            assert torch.equal(shard.parameter, part[begin:end])
            assert torch.equal(shard.gradient, part[begin:end])
            assert shard.first_element == (int(part[begin]) if begin < end else shard.first_element)


def test_small_parts_are_not_cut():
    bounds = (0, 4096, 8192, 12288)
    held = ShardRange((96, 128), bounds, 0, FakeGroup(1, 3))
    part = torch.zeros(4096)
    shard = FlatShard(part, part, held, 0, Workspace())
    assert [(one is shard, a, b) for one, a, b in pieces_of(shard, 4096)] == [(True, 0, 4096)]


@pytest.mark.parametrize("case", ["AdamW", "8 bits", "by chance"])
def test_a_step_takes_the_memory_of_a_piece(case, monkeypatch):
    """At most eight fp32 tensors of a piece: moments, a gradient and weights opened to fp32, a direction, noise."""
    cls, dtype, keys = CASES[case]
    at_once, numel = 2**18, 2**22
    p = nn.Parameter(torch.randn(numel, dtype=dtype))
    optimizer = cls([{"params": [nn.Parameter(torch.zeros(2, 2))], "rank": 1}, {"params": [p]}], **{"lr": 0.1, **keys})
    for _ in range(2):
        p.grad = torch.randn_like(p)
        ledger = Ledger([p, p.grad, *optimizer.state[p].values()])
        with ledger:
            optimizer.step()
    assert 4 * at_once <= ledger.at_peak.bytes <= 8 * 4 * at_once < 4 * numel
