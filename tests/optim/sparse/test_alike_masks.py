"""Masks that are changed together, as on a GPU, are those that each matrix gets alone, to the bit."""

import pytest
import torch
from torch import nn

from gracile.optim import BlockSparseAdamW, RigLAdamW, SETAdamW, SparseAdamW, SRigLAdamW
from gracile.optim.core import batches
from gracile.optim.sparse import alike_masks, alike_structures
from gracile.optim.sparse import optimizer as optimizer_of
from gracile.optim.sparse.top_k import first_of, first_of_rows, places_of, ranked

ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CLOCK = {"update_every": 3, "drop_fraction": 0.4, "t_end": 14}
SHAPES = [(24, 16), (16, 24), (4, 24, 16), (24, 16), (24, 16), (8, 4, 3, 3), (24, 16)]
STEPS = 10
MADE = {
    "SET": (SETAdamW, {}),
    "SET anew": (SETAdamW, {"reinit_when_same": True, "drop_fraction": 0.9}),
    "RigL": (RigLAdamW, {}),
    "RigL of ages": (RigLAdamW, {"grown_step": "own", "grown_warmup": 3, "distribution": "uniform"}),
    "SRigL": (SRigLAdamW, {"gamma_sal": 0.9}),
    "SRigL anew": (SRigLAdamW, {"reinit_when_same": True, "drop_fraction": 0.9}),
    "SRigL of two": (SRigLAdamW, {"gamma_sal": 2.5, "distribution": "uniform"}),
    "SRigL of few rows": (SRigLAdamW, {"gamma_sal": 0.99, "drop_fraction": 0.1}),
    "SRigL of all rows": (SRigLAdamW, {"gamma_sal": 0}),
    "BLaST": (BlockSparseAdamW, {"block_size": 4}),
    "lamp": (SparseAdamW, {"distribution": "lamp", "drop_fraction": 1.0}),
    "momentum": (SparseAdamW, {"grow": "momentum", "initial_sparsity": 0.2}),
    "momentum in 16 bits": (SparseAdamW, {"grow": "momentum", "state_dtype": torch.bfloat16}),
    "random rows": (SparseAdamW, {"drop": "random", "grow": "random", "structure": "constant_fan_in"}),
    "random blocks": (SparseAdamW, {"drop": "random", "grow": "random", "structure": "block", "block_size": 2}),
    "MEST": (SparseAdamW, {"drop": "gradient_magnitude", "drop_lambda": 0.5, "distribution": "er"}),
    "frozen": (SparseAdamW, {"outside": "frozen", "init": "smallest", "decay_to": "start"}),
    "frozen of ages": (SparseAdamW, {"outside": "frozen", "grow": "random", "grown_step": "own"}),
    "nothing": (SETAdamW, {"density": 1e-3, "sparsity": None, "distribution": "er"}),
    "everything": (RigLAdamW, {"sparsity": 0.0}),
}


def trained(name, dtype=torch.float32):
    cls, own = MADE[name]
    generator = torch.Generator().manual_seed(0)
    shapes = [s for s in SHAPES if len(s) < 4 or not {"block_size", "structure"} & own.keys()]
    held = [nn.Parameter((0.3 * torch.randn(s, generator=generator)).to(dtype)) for s in shapes]
    keys = {"sparsity": 0.7, **CLOCK, **own}
    anew = {"reinit_when_same": keys.pop("reinit_when_same", False)}
    optimizer = cls([{"params": held[:2]}, {"params": held[2:], **anew}], **ADAM, **keys)
    for t in range(STEPS):
        for i, p in enumerate(held):
            G = torch.randn(p.shape, generator=generator).mul_(4).round_().to(dtype)  # many are equal
            p.grad = None if i == 3 and t < 2 else G
        optimizer.step()
    return [p.detach() for p in held], [dict(optimizer.state[p]) for p in held]


@pytest.fixture
def together(monkeypatch):
    """As on a GPU. How many matrices were changed at a time."""
    sizes, alike = [], alike_structures.alike

    def watched(wanted):
        for batch in alike(wanted):
            sizes.append(batch.count)
            yield batch

    monkeypatch.setattr(alike_masks, "launches_cost", lambda device: True)
    monkeypatch.setattr(alike_structures, "alike", watched)
    return sizes


def assert_same(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one[1], other[1], strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert value.dtype == b[key].dtype, key
            assert torch.equal(value, b[key]), key


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in MADE),
        *((name, torch.bfloat16) for name in ("RigL", "SRigL", "BLaST", "MEST", "frozen")),
        ("SRigL", torch.float64),
    ],
    ids=str,
)
def test_masks_changed_together_are_those_of_each(name, dtype, together, monkeypatch):
    found = trained(name, dtype)
    assert bool(together) == (dtype != torch.float64), "doubles are changed alone"
    assert not together or max(together) > 1 or name == "nothing"  # whose masks are empty
    monkeypatch.setattr(alike_masks, "launches_cost", lambda device: False)
    count = len(together)
    assert_same(found, trained(name, dtype))
    assert len(together) == count


@pytest.mark.parametrize("name", ["RigL", "SRigL", "random blocks", "momentum"])
def test_a_workspace_of_any_size_makes_no_difference(name, together, monkeypatch):
    found = trained(name)
    together.clear()
    monkeypatch.setattr(batches, "AT_ONCE", 2 * 24 * 16)
    assert_same(found, trained(name))
    assert max(together) <= 2
    monkeypatch.setattr(batches, "AT_ONCE", 300)  # all but the convolution alone
    together.clear()
    assert_same(found, trained(name))
    assert max(together, default=0) <= 1


def test_masks_that_were_empty_grow(together):
    W = [nn.Parameter(torch.randn(8, 6)) for _ in range(2)]
    optimizer = RigLAdamW(W, lr=0.1, density=0.0, update_every=1, t_end=9)
    for density in (0.0, 0.5, 0.5):
        optimizer.param_groups[0]["density"] = density
        for p in W:
            p.grad = torch.randn(8, 6)
        optimizer.step()
    assert [len(optimizer.state[p]["exp_avg"]) for p in W] == [24, 24]
    assert together == [2]


def test_state_has_memory_of_its_own(together):
    """A tensor that is saved brings all of its storage along."""
    _, states = trained("RigL")
    for state in states:
        for value in state.values():
            assert value.untyped_storage().nbytes() == value.nbytes


def test_masks_that_weights_split_are_changed_alone(together, monkeypatch):
    """What other processes have a part of is not in a batch."""
    seen = []
    monkeypatch.setattr(optimizer_of, "is_whole", lambda matrix: bool(seen.append(matrix)))
    trained("RigL")
    assert seen
    assert not together
    seen[0].shard.split = True
    assert not alike_masks.is_whole(seen[0])
    seen[0].shard.split = False
    assert alike_masks.is_whole(seen[0])


def test_orders_have_no_ties_and_what_is_out_comes_last():
    keys = torch.tensor([[5, 7, 5, -1, 7, 2], [0, 0, 0, 0, -1, -1], [3, 3, 3, 3, 3, 3]], dtype=torch.int32)
    order = ranked(keys, torch.arange(5, -1, -1))
    counts = [3, 0, 2]
    column = torch.tensor(counts)[:, None]
    expected = torch.tensor([[1, 1, 0, 0, 1, 0], [0] * 6, [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(first_of(order, counts, column), expected)
    assert torch.equal(first_of_rows(order, column), expected)
    assert not first_of(order, [0] * 3, column).any()
    assert places_of(expected.view(-1), 6).tolist() == [0, 1, 4, 12, 13, 18]
