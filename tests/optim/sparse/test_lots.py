"""Matrices that are moved in lots, as on a GPU, go where each goes alone."""

import pytest
import torch
from torch import nn

from gracile.nm_pattern import largest
from gracile.optim import CastAdamS, HyperSparseAdamW, SRSTEAdamW, WGSEFAdamW
from gracile.optim.core import batches
from gracile.optim.core import optimizer as stepping
from gracile.optim.core.types import ParamStep
from gracile.optim.distributed import FlatShard, FullShard, ShardRange, Workspace
from gracile.optim.distributed.process_group import FakeGroup
from gracile.optim.sparse import lots as in_lots
from gracile.optim.sparse import prune_smallest
from gracile.optim.sparse.lots import lots_of

SHAPES = [(16, 24), (24, 16), (3, 8, 12), (5, 12), (16, 24), (40, 8)]
STEPS = 9
MADE = {
    "SR-STE": (SRSTEAdamW, {"sr_lambda": 0.1}, {"n": 2, "m": 4}),
    "SR-STE decoupled": (SRSTEAdamW, {"sr_lambda": 0.1, "decoupled": True}, {"n": 1, "m": 2}),
    "CAST": (CastAdamS, {"lam": 0.1, "mask_every": 2, "total_steps": 7}, {"n": 2, "m": 4}),
    "HyperSparse": (
        HyperSparseAdamW,
        {"hs_lambda": 0.01, "warmup_steps": 2, "interval": 2, "quantile_every": 3, "prune_at": 6},
        {"sparsity": 0.7},
    ),
    **{
        f"WGSEF of {groups}": (
            WGSEFAdamW,
            {"groups": groups, "block_size": 8, "wgsef_lambda": 0.05, "ramp_steps": 3, "finish_at": 6},
            {"keep": 0.3},
        )
        for groups in ("rows", "columns", "blocks")
    },
    "WGSEF of uneven blocks": (
        WGSEFAdamW, {"groups": "blocks", "block_size": 5, "wgsef_lambda": 0.05, "ramp_steps": 0}, {"keep": 0.3}
    ),
}  # fmt: skip
by_method = pytest.mark.parametrize("name", MADE)


def trained(name, dtype=torch.float32, **more):
    """The weights and the state after some steps, of which one matrix misses two."""
    cls, own, keys = MADE[name]
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter((0.3 * torch.randn(s, generator=generator)).to(dtype)) for s in [*SHAPES, (7,)]]
    groups = [{"params": held[:-1], **keys}, {"params": held[-1:], **dict.fromkeys(keys.keys() - {"m"})}]
    optimizer = cls(groups, lr=0.05, weight_decay=0.1, **{**own, **more})
    for t in range(STEPS):
        for i, p in enumerate(held):
            G = torch.randn(p.shape, generator=generator).to(dtype)
            p.grad = None if i == 1 and t < 2 and cls.together is None else G
        optimizer.step()
    return [p.detach() for p in held] + [v for p in held for v in optimizer.state[p].values()]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on one. The lots that were moved."""
    lots = []
    for module in (batches, stepping, prune_smallest):
        monkeypatch.setattr(module, "launches_cost", lambda device: True)
    for cls in (SRSTEAdamW, CastAdamS, HyperSparseAdamW, WGSEFAdamW):
        move = cls.move_lot
        monkeypatch.setattr(cls, "move_lot", lambda self, lot, move=move: (lots.append(lot), move(self, lot))[1])
    return lots


@by_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lot_moves_each_as_it_would_move_alone(name, dtype, on_a_gpu, monkeypatch):
    """Rounded otherwise: the rule is a fused kernel there."""
    together = trained(name, dtype)
    assert on_a_gpu or "uneven" in name  # whose plain steps need none
    for module in (batches, stepping, prune_smallest):
        monkeypatch.setattr(module, "launches_cost", lambda device: False)
    loose = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(together, trained(name, dtype), strict=True):
        if one.dtype == torch.uint8:
            assert float((one != other).float().mean()) <= (0 if dtype == torch.float32 else 0.2)
        else:
            apart = torch.linalg.vector_norm((one - other).double())
            assert apart <= loose * torch.linalg.vector_norm(other.double()) + 1e-9


@by_method
def test_a_workspace_of_any_size_makes_no_difference(name, on_a_gpu, monkeypatch):
    dtype = torch.float64 if name == "HyperSparse" else torch.float32  # whose tanh differs at the ends on a CPU
    whole = trained(name, dtype)
    count = len(on_a_gpu)
    monkeypatch.setattr(batches, "AT_ONCE", 72)
    monkeypatch.setattr(in_lots, "IN_A_LOT", 72)
    for one, other in zip(trained(name, dtype), whole, strict=True):
        near = dtype == torch.float64 and torch.allclose(one, other, rtol=1e-12, atol=1e-14)
        assert near or torch.equal(one, other)
    assert len(on_a_gpu) > 3 * count or not count
    assert all(sum(span.stop - span.start for span in lot.spans) <= 72 for lot in on_a_gpu[count:])


def test_what_is_rounded_by_chance_or_lies_otherwise_is_moved_alone(on_a_gpu):
    trained("SR-STE", torch.bfloat16, stochastic_rounding=True)
    assert not on_a_gpu
    p = nn.Parameter(torch.randn(16, 8).t())
    optimizer = SRSTEAdamW([p], n=2, m=4)
    p.grad = torch.randn(8, 16)
    optimizer.step()
    assert not on_a_gpu


@pytest.mark.parametrize(("begin", "fits"), [(12, True), (14, False)])
def test_a_part_that_cuts_a_group_of_m_is_moved_with_the_rest_of_it(begin, fits):
    held = ShardRange((4, 8), (0, begin, 32), 0, FakeGroup(1, 2))
    own = torch.zeros(32 - begin)
    optimizer = SRSTEAdamW([nn.Parameter(torch.zeros(4, 8))])
    item = ParamStep(FlatShard(own, own, held, 0, Workspace()), {"n": 2, "m": 4}, {})
    assert optimizer.fits_in_lots(item) == fits


def test_pieces_begin_at_multiples_of_their_unit(monkeypatch):
    monkeypatch.setattr(in_lots, "IN_A_LOT", 20)
    shards = [FlatShard(torch.arange(n), torch.arange(n), ShardRange((n,), (0, n), 0, FakeGroup(0, 1)), 0, Workspace())
              for n in (8, 40, 24, 4)]  # fmt: skip
    lots = list(lots_of([ParamStep(shard, {}, {}) for shard in shards], unit=8))
    assert [[(span.start, span.stop) for span in lot.spans] for lot in lots] == [
        [(0, 8), (0, 8)], [(8, 24)], [(24, 40)], [(0, 16)], [(16, 24), (0, 4)]
    ]  # fmt: skip
    assert all(torch.equal(W, G) for lot in lots for W, G in zip(lot.weights, lot.gradients, strict=True))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 8), (1, 8)])
def test_all_pairs_at_once_make_the_same_choice(n, m):
    """Ties and what is not finite among them."""
    W = torch.randint(-2, 3, (64, 8 * m), generator=torch.Generator().manual_seed(0)).float()
    W[0, 0], W[1, 1] = torch.nan, torch.inf
    assert torch.equal(largest(W, n, m, at_once=True), largest(W, n, m))
    assert largest(W[2:], n, m, at_once=True).view(-1, m).sum(1).unique().tolist() == [n]


@pytest.mark.parametrize("at_once", [2**25, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_nth_smallest_is_found_without_a_stop(dtype, at_once, on_a_gpu, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    held = [torch.randn(s, generator=generator).mul_(8).round_().to(dtype) for s in SHAPES]
    shards = [FullShard(W, i, Workspace()) for i, W in enumerate(held)]
    monkeypatch.setattr(batches, "AT_ONCE", at_once)
    monkeypatch.setattr(torch, "bincount", None)
    order = torch.cat([W.abs().reshape(-1) for W in held]).double().sort().values
    for n in (1, 300, 700, len(order)):
        key, missing = prune_smallest.nth_smallest(shards, torch.tensor(n))
        assert prune_smallest.value_of(key, shards) == order[n - 1]
        assert missing == n - (order < order[n - 1]).sum()
