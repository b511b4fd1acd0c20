"""Weights that masks take in later: how far their first updates go, and that their ages are kept."""

import copy

import pytest
import torch
from torch import nn

from gracile.optim import (
    BlockSparseAdamW,
    RigLAdamW,
    SETAdamW,
    SparseAdamW,
    SRigLAdamW,
    full_state,
    load_full_state,
    state_bytes,
)

LR, AT = 1e-3, 1000


def moves_of_grown(steps, at=AT, **keys):
    """How far grown weights move in each step after the one change of a mask, in learning rates, and kept ones."""
    W = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    clock = {"update_every": at, "t_end": at + 1, "drop_fraction": 0.3, "schedule": "constant"}
    optimizer = SparseAdamW([W], lr=LR, weight_decay=0.0, sparsity=0.5, distribution="uniform", **clock, **keys)
    G = torch.where(torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    before = W.detach() != 0
    for _ in range(at):
        W.grad = G.clone()
        optimizer.step()
    now = torch.zeros(256, dtype=torch.bool).index_fill_(0, optimizer.state[W]["indices"].long(), True).view(16, 16)
    grown, kept = now & ~before, now & before
    assert grown.sum() > 20
    found = []
    for _ in range(steps):
        was = W.detach().clone()
        W.grad = G.clone()
        optimizer.step()
        moved = (W.detach() - was).abs() / LR
        found.append((moved[grown], moved[kept]))
    return found


def test_with_its_matrix_counter_a_grown_weight_jumps():
    """The cold start that the option is for: figures computed from Adam's own formula."""
    found = moves_of_grown(12)
    for step, expected in ((1, 3.16 / 0.795), (12, 6.57 / 0.795)):  # the shared correction is not yet 1 at step 1000
        grown, kept = found[step - 1]
        torch.testing.assert_close(kept, torch.ones_like(kept), rtol=1e-3, atol=0)
        root = ((1 - 0.999 ** (AT + step)) / (1 - 0.999**step)) ** 0.5 * (1 - 0.9**step)
        torch.testing.assert_close(grown, torch.full_like(grown, root), rtol=1e-3, atol=0)
        assert 0.6 * expected < grown[0] < expected


@pytest.mark.parametrize("warmup", [0, 10])
def test_with_its_own_age_it_moves_by_a_learning_rate_or_its_share(warmup):
    found = moves_of_grown(14, grown_step="own", grown_warmup=warmup)
    for age, (grown, kept) in enumerate(found, start=1):
        share = min(1, age / warmup) if warmup else 1
        torch.testing.assert_close(grown, torch.full_like(grown, share), rtol=1e-3, atol=0)
        torch.testing.assert_close(kept, torch.ones_like(kept), rtol=1e-3, atol=0)


@pytest.mark.parametrize("grown_warmup", [0, 5])
def test_where_nothing_grows_it_is_the_shared_counter(grown_warmup):
    ends = []
    for keys in ({}, {"grown_step": "own", "grown_warmup": grown_warmup}):
        W = nn.Parameter(torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        optimizer = RigLAdamW([W], lr=0.01, sparsity=0.5, update_every=50, t_end=100, **keys)
        for t in range(30):
            W.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            optimizer.step()
        ends.append(W.detach().clone())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-13)


CASES = {
    "SET": (SETAdamW, {}),
    "RigL": (RigLAdamW, {}),
    "RigL starting anew": (RigLAdamW, {"reinit_when_same": True}),
    "SRigL": (SRigLAdamW, {}),
    "BLaST": (BlockSparseAdamW, {"block_size": 4, "drop_fraction": 0.3}),
}


def made(name, W):
    cls, keys = CASES[name]
    keys = {"sparsity": 0.5, "update_every": 2, "t_end": 40, "grown_step": "own", "grown_warmup": 3, **keys}
    return cls([W], lr=0.01, **keys)


def advance(optimizer, W, first, last):
    for t in range(first, last):
        W.grad = torch.randn(W.shape, generator=torch.Generator().manual_seed(t), dtype=W.dtype)
        optimizer.step()


def weights(dtype):
    return nn.Parameter(torch.randn(16, 12, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_ages_are_those_of_a_dense_record(name, dtype):
    """A weight's age counts from the step that it came into the mask for good."""
    W = weights(dtype)
    optimizer, since = made(name, W), torch.zeros(192, dtype=torch.int32)
    was = None
    for t in range(12):
        advance(optimizer, W, t, t + 1)
        at = optimizer.state[W]["indices"].long()
        now = torch.zeros(192, dtype=torch.bool).index_fill_(0, at, True)
        if was is not None:
            since[now & ~was] = t + 1
        was = now
        born = optimizer.state[W]["born"]
        assert born.dtype == torch.int32
        if "anew" not in name:
            assert torch.equal(born, since[at])
        assert (born >= since[at]).all()
        assert W.isfinite().all()
    assert (born > 0).any()


@pytest.mark.parametrize("how", ["state_dict", "full_state", "copy"])
@pytest.mark.parametrize("name", CASES)
def test_ages_are_saved(name, how):
    W = weights(torch.float32)
    optimizer = made(name, W)
    advance(optimizer, W, 0, 7)
    V = nn.Parameter(W.detach().clone())
    other = made(name, V)
    if how == "copy":
        other, V = copy.deepcopy((optimizer, W))
    elif how == "state_dict":
        other.load_state_dict(optimizer.state_dict())
    else:
        load_full_state(other, full_state(optimizer))
    advance(optimizer, W, 7, 14)
    advance(other, V, 7, 14)
    assert torch.equal(W, V)


def test_four_bytes_a_weight_are_planned():
    keys = {"sparsity": 0.75, "t_end": 100}
    plain, aged = (RigLAdamW.state_bytes_for((64, 32), **keys, **more) for more in ({}, {"grown_step": "own"}))
    assert aged - plain == 4 * 64 * 32 / 4
    W = nn.Parameter(torch.randn(64, 32))
    optimizer = RigLAdamW([W], **keys, grown_step="own")
    W.grad = torch.randn(64, 32)
    optimizer.step()
    assert state_bytes(optimizer) == aged


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"grown_step": "mine"}, "grown_step must be one of shared, own, got 'mine'"),
        ({"grown_step": "own", "grown_warmup": -1}, "grown_warmup must be a whole number >= 0, got -1"),
        ({"grown_warmup": 5}, "grown_warmup must be 0 unless grown_step='own', got 5"),
    ],
)
def test_bad_values(keys, words):
    with pytest.raises(ValueError, match=words):
        RigLAdamW([weights(torch.float32)], sparsity=0.5, t_end=10, **keys)
