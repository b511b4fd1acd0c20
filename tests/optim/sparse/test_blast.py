"""Block-sparse AdamW beside a dense loop: blocks that are whole, fewer and fewer of them, by norms."""

import math

import pytest
import torch
from torch import nn

from gracile.optim import BlockSparseAdamW, SparseAdamW
from gracile.optim.distributed import FlatShard, ShardRange
from gracile.optim.distributed.process_group import FakeGroup
from gracile.optim.sparse import gather_scatter as places_module
from gracile.optim.sparse.gather_scatter import Places
from gracile.optim.sparse.mask_schedule import density_at
from tests.oracle import sparse as oracle

SHAPES = {"tall": (24, 12), "wide": (12, 24), "square": (16, 16)}
ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
CLOCK = {"update_every": 4, "drop_fraction": 0.3, "t_end": 24}

by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def weights(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.3 * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype)) for s in shapes]


def gradients(held, t):
    """With a part that stays, so that some blocks outside of a mask promise more than others."""
    staying, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(1000 + t)
    both = [[torch.randn(p.shape, generator=g, dtype=torch.float64) for p in held] for g in (staying, noise)]
    return [(a + b).to(p.dtype) for a, b, p in zip(*both, held, strict=True)]


def step(optimizer, held, given):
    for p, G in zip(held, given, strict=True):
        p.grad = G.clone()
    optimizer.step()


def mask_of(optimizer, p):
    mask = torch.zeros(p.numel(), dtype=torch.bool)
    mask[optimizer.state[p]["indices"].long()] = True
    return mask.view(p.shape)


def blocks_of(mask, side):
    """Which blocks are there; each is there as a whole or not at all."""
    counts = mask.double().unfold(0, side, side).unfold(1, side, side).sum((2, 3))
    assert set(counts.flatten().tolist()) <= {0.0, float(side * side)}
    return counts > 0


def sparsity_at(t, first, last, end):
    return last + (first - last) * (1 - min(1.0, t / end)) ** 3


# ---- beside the dense loop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("initial", "side"), [(0.0, 4), (0.5, 2), (None, 2), (None, 1)])
def test_it_is_the_dense_loop(dtype, gap, initial, side):
    """26 steps with five updates or six, matrices in groups of their own: each has the share that its size has."""
    held = weights(*SHAPES.values(), dtype=dtype)
    start = [p.detach().clone() for p in held]
    optimizer = BlockSparseAdamW(
        [{"params": [p]} for p in held], **ADAM, **CLOCK, weight_decay=0.1,
        sparsity=0.75, initial_sparsity=initial, block_size=side,
    )  # fmt: skip

    def change(number, W, M, G, fraction, t):
        share = 1 - sparsity_at(t, 0.75 if initial is None else initial, 0.75, 24)
        return oracle.blocks(W, M, G, fraction, round(share * W.numel() / side**2), side)

    reference = oracle.Sparse(
        start, [p != 0 for p in held], change, **ADAM, decay=0.1, every=4, fraction=0.3, end=24,
    )  # fmt: skip
    masks = set()
    for t in range(26):
        given = gradients(held, t)
        step(optimizer, held, given)
        reference.step(given, last=initial is not None and t + 1 == 24)
        for p, W, M, moments in zip(held, reference.weights, reference.masks, reference.moments, strict=True):
            mask, state = mask_of(optimizer, p), optimizer.state[p]
            assert torch.equal(mask, M)
            assert (p.double() - W).abs().max() <= gap
            for key, expected in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                assert (state[key].double() - expected[M]).abs().max() <= gap
            share = 1 - sparsity_at((t + 1) // 4 * 4, 0.75 if initial is None else initial, 0.75, 24)
            assert blocks_of(mask, side).sum() == round(share * p.numel() / side**2)
        masks.add(tuple(torch.cat([M.flatten() for M in reference.masks]).tolist()))
    assert len(masks) >= 3


# ---- blocks ---------------------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_are_of_whole_blocks_and_never_more_of_them(shape, dtype):
    held = weights(shape, dtype=dtype)
    optimizer = BlockSparseAdamW(held, **ADAM, **CLOCK, weight_decay=0.1, sparsity=0.8, block_size=4)
    assert held[0].all(), "it begins dense"
    total, seen = held[0].numel() // 16, []
    for t in range(28):
        step(optimizer, held, gradients(held, t))
        mask = mask_of(optimizer, held[0])
        seen.append(int(blocks_of(mask, 4).sum()))
        assert not held[0][~mask].any()
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == total
    assert seen[-1] == round((1 - 0.8) * total)
    assert len(set(seen)) > 3
    final = mask_of(optimizer, held[0])
    step(optimizer, held, gradients(held, 28))
    assert torch.equal(mask_of(optimizer, held[0]), final)


def test_at_the_ends_of_the_ramp_sparsity_is_what_was_asked_for():
    held = weights((16, 16))
    optimizer = BlockSparseAdamW(held, sparsity=0.8, initial_sparsity=0.2, block_size=4, t_end=40, t_begin=10)
    (group,) = optimizer.param_groups
    densities = [density_at(t, optimizer.settings(group)) for t in (0, 10, 25, 40, 99)]
    assert densities == pytest.approx([0.8, 0.8, 0.2 + 0.6 * 0.5**3, 0.2, 0.2])


def test_the_last_of_the_ramp_comes_though_t_end_is_no_time_of_an_update():
    held = weights((16, 16))
    optimizer = BlockSparseAdamW(held, **{**CLOCK, "t_end": 11}, sparsity=0.75, block_size=2)
    counts = []
    for t in range(12):
        step(optimizer, held, gradients(held, t))
        counts.append(len(optimizer.state[held[0]]["indices"]) // 4)
    assert counts == [64] * 3 + [28] * 4 + [17] * 3 + [16] * 2  # round((0.25 + 0.75 (1 - t / 11)^3) 64)


def test_blocks_are_ranked_by_their_norms():
    """Neither by a sum, in which signs cancel, nor by the largest weight, nor by the sum of sizes."""
    p = nn.Parameter(torch.zeros(4, 8))
    p.data[:2, :2] = torch.tensor([[3.0, -3.0], [3.0, -3.0]])  # norm 6, sum 0
    p.data[:2, 2:4] = 2.5  # norm 5, of sizes 10
    p.data[:2, 4:6] = torch.tensor([[5.5, 0.0], [0.0, 0.0]])  # norm 5.5, of sizes 5.5
    p.data[:2, 6:8] = torch.tensor([[4.0, 0.1], [0.1, 0.1]])  # norm 4, larger than any of the first two
    G = torch.zeros(4, 8)
    G[2:, :2] = torch.tensor([[1.0, -1.0], [1.0, -1.0]])  # norm 2, sum 0
    G[2:, 2:4] = torch.tensor([[1.5, 0.0], [0.0, 0.0]])  # norm 1.5
    G[2:, 4:6] = 0.6  # norm 1.2, of sizes 2.4
    optimizer = BlockSparseAdamW(
        [p], lr=0.0, sparsity=0.5, initial_sparsity=None, block_size=2, update_every=1, drop_fraction=0.5, t_end=1000
    )
    step(optimizer, [p], [G])
    # floor(0.4999.. 4) go, of norms 5.5 and 6, 5, 4: the last; and the largest gradient's block comes
    assert blocks_of(mask_of(optimizer, p), 2).tolist() == [[True, True, True, False], [True, False, False, False]]


def test_only_blocks_of_the_mask_are_kept_though_all_of_them_are_zero():
    """Eight of 15 stay, the first ones that are there."""
    p = nn.Parameter(torch.zeros(6, 20))
    keys = {"lr": 0.0, "update_every": 1, "drop_fraction": 0.5, "t_end": 1000, "seed": 3}
    optimizer = BlockSparseAdamW([p], **keys, sparsity=0.5, initial_sparsity=None, block_size=2)
    G = torch.arange(120.0).view(6, 20)
    step(optimizer, [p], [G])
    old = blocks_of(mask_of(optimizer, p), 2)
    assert not old.flatten()[:8].all()
    step(optimizer, [p], [G])
    kept = oracle.best(torch.zeros(3, 10), old, 8)
    assert torch.equal(blocks_of(mask_of(optimizer, p), 2), kept | oracle.best(oracle_norms(G, 2), ~kept, 7))


def test_a_block_that_comes_leaves_the_product_as_it_was():
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    layer.weight.data[:4] = 0
    optimizer = BlockSparseAdamW(
        layer.parameters(), lr=0.0, sparsity=0.25, initial_sparsity=None, block_size=4, update_every=1,
        drop_fraction=0.0, t_end=9,
    )  # fmt: skip
    x = torch.randn(5, 16)
    before, first = layer(x).detach(), layer.weight.detach().clone()
    step(optimizer, [layer.weight], [torch.ones(16, 16)])
    assert blocks_of(mask_of(optimizer, layer.weight), 4).sum() == 12
    optimizer.param_groups[0]["sparsity"] = 0.0  # all others come
    optimizer.param_groups[0]["drop_fraction"] = 1e-9
    step(optimizer, [layer.weight], [torch.ones(16, 16)])
    assert mask_of(optimizer, layer.weight).all()
    assert torch.equal(layer.weight, first)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_sparsity_it_is_dense_training(dtype):
    """To rounding: decay and step are added to the weights at once."""
    held, twins = weights((16, 16), dtype=dtype), weights((16, 16), dtype=dtype)
    optimizer = BlockSparseAdamW(held, **ADAM, **CLOCK, weight_decay=0.1, sparsity=0.0, block_size=4)
    plain = torch.optim.AdamW(twins, **ADAM, weight_decay=0.1)
    for t in range(26):
        for one, own in ((optimizer, held), (plain, twins)):
            step(one, own, gradients(own, t))
    assert (held[0] - twins[0]).abs().max() < 20 * torch.finfo(dtype).eps
    assert mask_of(optimizer, held[0]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [16, 24])
def test_large_blocks_are_read_in_runs_as_one_by_one(monkeypatch, dtype, side):
    """To the last bit of a sum; in bf16 one by one rounds the direction once more."""
    runs = []
    for least in (16, 1000):
        monkeypatch.setattr(places_module, "WORTH_A_RUN", least)
        held = weights((48, 96), (96, 48), dtype=dtype)
        optimizer = BlockSparseAdamW(held, **ADAM, **CLOCK, weight_decay=0.1, sparsity=0.6, block_size=side)
        counts = []
        for t in range(10):
            step(optimizer, held, gradients(held, t))
            counts.append([int(blocks_of(mask_of(optimizer, p), side).sum()) for p in held])
            assert not any(p[~mask_of(optimizer, p)].any() for p in held)
        moments = [optimizer.state[p][key] for p in held for key in ("indices", "exp_avg", "exp_avg_sq")]
        runs.append([*(p.detach() for p in held), *moments])
    assert len({str(c) for c in counts}) == 3
    gaps = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.02, torch.int32: 0}
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=gaps[a.dtype])


@pytest.mark.parametrize("begin", [0, 8, 16, 32, 48, 80, 81])
@pytest.mark.parametrize("end", [112, 128, 160, 161, 192])
def test_a_part_that_begins_or_ends_within_a_block_has_shorter_runs(begin, end):
    """Rows of 64 with blocks of 32, the first of each row in the mask."""
    places = torch.arange(192)
    (at,) = (places[begin:end] % 64 < 32).nonzero(as_tuple=True)
    flat, values = torch.randn(end - begin), torch.randn(len(at))
    piece = ShardRange((3, 64), (0, begin, end, 192), 0, FakeGroup(1, 3))
    held = Places(FlatShard(flat, flat, piece, 0, None), {"block_size": 32}, at.int())
    assert torch.equal(held.of(flat), flat[at])
    expected = flat.index_add(0, at, values, alpha=-0.5)
    held.add_(flat, values, -0.5)
    torch.testing.assert_close(flat, expected)


# ---- first masks ----------------------------------------------------------------------------------------------------


def test_first_blocks_are_drawn_as_likely_anywhere():
    counted = torch.zeros(3, 4)
    for seed in range(300):
        p = nn.Parameter(torch.ones(6, 8))
        BlockSparseAdamW([p], sparsity=0.75, initial_sparsity=None, block_size=2, t_end=9, seed=seed)
        counted += blocks_of(p.detach() != 0, 2)
    assert counted.sum() == 3 * 300
    assert (counted / 300 - 0.25).abs().max() < 4.5 * math.sqrt(0.25 * 0.75 / 300)


def test_first_blocks_may_be_those_of_the_largest_norm():
    held = weights((12, 24))
    norms = oracle_norms(held[0].detach(), 4)
    BlockSparseAdamW(held, sparsity=0.75, initial_sparsity=None, block_size=4, t_end=9, init="magnitude")
    kept = blocks_of(held[0] != 0, 4)
    assert torch.equal(kept, oracle.best(norms, torch.ones_like(kept), round(0.25 * 18)))


def oracle_norms(X, side):
    return X.unfold(0, side, side).unfold(1, side, side).square().sum((2, 3)).sqrt()


@pytest.mark.parametrize("init", [None, "magnitude"])
def test_a_trained_model_keeps_its_blocks(init):
    trained = weights((24, 12))
    keys = {"sparsity": 0.75, "initial_sparsity": None, "block_size": 4}
    optimizer = BlockSparseAdamW(trained, **ADAM, **CLOCK, **keys)
    for t in range(11):
        step(optimizer, trained, gradients(trained, t))
    held = [nn.Parameter(trained[0].detach().clone())]
    again = BlockSparseAdamW(held, **{**ADAM, "lr": 0.0}, **CLOCK, **keys, init=init)
    step(again, held, gradients(held, 0))
    assert torch.equal(held[0], trained[0])
    assert torch.equal(mask_of(again, held[0]), mask_of(optimizer, trained[0]))


def test_random_growth_and_drops_of_blocks_are_exact():
    held = weights((24, 12))
    optimizer = SparseAdamW(
        held, **ADAM, **CLOCK, structure="block", block_size=4, sparsity=0.5, drop="random", grow="random"
    )
    masks = []
    for t in range(9):
        step(optimizer, held, gradients(held, t))
        masks.append(blocks_of(mask_of(optimizer, held[0]), 4))
        assert masks[-1].sum() == 9
    assert not torch.equal(masks[3], masks[2])
    assert not torch.equal(masks[7], masks[6])


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_a_block_that_does_not_divide_both_sides_is_refused(shape):
    with pytest.raises(ValueError, match=r"block_size=4 does not divide both sides of a matrix of shape \(\d+, \d+\)"):
        BlockSparseAdamW(weights(shape), sparsity=0.5, block_size=4, t_end=9)


@pytest.mark.parametrize("size", [0, 2.0, True, -4])
def test_a_bad_block_size_is_refused(size):
    with pytest.raises(ValueError, match=f"block_size must be a whole number >= 1, got {size!r}"):
        BlockSparseAdamW(weights((24, 12)), sparsity=0.5, block_size=size, t_end=9)


# ---- the side of a block --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "size"),
    [([(128, 352), (352, 128)], 32), ([(512, 1376)], 32), ([(1024, 2736)], 16), ([(64, 128)], 64), ([(24, 40)], 8)],
    ids=str,
)
def test_without_a_block_size_it_is_the_largest_that_divides_a_groups_matrices(shapes, size):
    """Those of quickstart, 60m and 350m among them, of which 64 divides none."""
    held = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for shape in shapes]
    groups = [{"params": (p for p in held), "sparsity": 0.5}, {"params": [nn.Parameter(torch.ones(3))]}]
    optimizer = BlockSparseAdamW(groups, t_end=10, initial_sparsity=None)
    assert [group["block_size"] for group in optimizer.param_groups] == [size, None]
    for p in held:
        blocks = (p.detach() != 0).unflatten(0, (-1, size)).unflatten(2, (-1, size)).sum(dim=(1, 3)).unique()
        assert blocks.tolist() == [0, size * size]


def test_matrices_that_no_block_divides_are_refused():
    held = [nn.Parameter(torch.ones(20, 12)), nn.Parameter(torch.ones(16, 16))]
    with pytest.raises(
        ValueError, match=r"block_size: none of 64, 32, 16, 8 divides all .* \(16, 16\), \(20, 12\); give"
    ):
        BlockSparseAdamW(held, sparsity=0.5, t_end=10)
