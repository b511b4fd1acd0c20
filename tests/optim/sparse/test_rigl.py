"""SET and RigL beside a dense loop with brute-force sorts; what is kept, dropped and grown; and published flaws."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gracile.optim import RigLAdamW, SETAdamW, SparseAdamW
from gracile.optim.sparse.mask_schedule import drop_fraction_at
from tests.oracle import sparse as oracle

SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (16, 16), "row": (1, 40), "kernel": (6, 4, 3, 3)}
ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
CLOCK = {"update_every": 5, "drop_fraction": 0.4, "t_end": 30}

by_class = pytest.mark.parametrize("cls", [SETAdamW, RigLAdamW])
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def weights(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.3 * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype)) for s in shapes]


def gradients(held, t):
    """With a part that stays, so that some places outside of a mask promise more than others."""
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


def moments_of(optimizer, p):
    """Dense."""
    state = optimizer.state[p]
    at = state["indices"].long()
    return [
        torch.zeros(p.numel(), dtype=m.dtype).index_copy_(0, at, m).view(p.shape)
        for m in (state["exp_avg"], state["exp_avg_sq"])
    ]


def watched(optimizer, held, steps):
    """Mask, weights and gradient of each matrix after every step."""
    for t in range(steps):
        given = gradients(held, t)
        before = [p.detach().clone() for p in held]
        step(optimizer, held, given)
        for number, p in enumerate(held):
            yield SimpleNamespace(
                t=t + 1, number=number, mask=mask_of(optimizer, p), W=p.detach().clone(), G=given[number],
                before=before[number], moments=moments_of(optimizer, p),
            )  # fmt: skip


# ---- beside the dense loop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("names", [("tall", "wide"), ("square", "kernel"), ("row",)], ids=" ".join)
@pytest.mark.parametrize("again", [False, True])
def test_rigl_is_the_dense_loop(names, dtype, gap, again):
    """25 steps with up to five updates."""
    held = weights(*(SHAPES[name] for name in names), dtype=dtype)
    start = [p.detach().clone() for p in held]
    optimizer = RigLAdamW(held, **ADAM, **CLOCK, weight_decay=0.1, sparsity=0.7, reinit_when_same=again)
    reference = oracle.Sparse(
        start, [p != 0 for p in held], lambda _, W, M, G, fraction, t: oracle.rigl(W, M, G, fraction),
        **ADAM, decay=0.1, every=5, fraction=0.4, end=30, again=again,
    )  # fmt: skip
    changed = 0
    for t in range(25):
        given, before = gradients(held, t), reference.masks[0].clone()
        step(optimizer, held, given)
        reference.step(given)
        changed += not torch.equal(before, reference.masks[0])
        for p, W, M, moments in zip(held, reference.weights, reference.masks, reference.moments, strict=True):
            assert torch.equal(mask_of(optimizer, p), M)
            for own, expected in zip((p.detach(), *moments_of(optimizer, p)), (W, *moments), strict=True):
                assert (own.double() - expected).abs().max() <= gap
    assert changed >= 3


@by_class
@by_dtype
def test_without_change_it_is_torch_adamw_on_a_part_of_the_weights(cls, dtype):
    """Whose gradient and weights are held at zero elsewhere."""
    held = weights((20, 12), dtype=dtype)
    optimizer = cls(held, **ADAM, weight_decay=0.1, sparsity=0.7, drop_fraction=0.0)
    (p,), mask = held, held[0] != 0
    twin = nn.Parameter(p.detach().clone())
    plain = torch.optim.AdamW([twin], **ADAM, weight_decay=0.1)
    for t in range(12):
        (G,) = gradients(held, t)
        step(optimizer, held, [G])
        step(plain, [twin], [G * mask])
        assert torch.equal(mask_of(optimizer, p), mask)
        assert not p[~mask].any()
    gap = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert (p - twin).abs().max() <= gap
    assert (p.detach() - weights((20, 12), dtype=dtype)[0] * mask).abs().max() > 0.1


# ---- counts ---------------------------------------------------------------------------------------------------------


@by_class
@by_dtype
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_as_many_weights_as_asked_for_at_every_step_and_zeros_elsewhere(cls, dtype, distribution):
    held = weights(*SHAPES.values(), dtype=dtype)
    optimizer = cls(held, **ADAM, **CLOCK, weight_decay=0.1, sparsity=0.8, distribution=distribution)
    first = [int((p != 0).sum()) for p in held]
    assert sum(first) == round((1 - 0.8) * sum(p.numel() for p in held))
    if distribution == "uniform":
        assert all(abs(k - 0.2 * p.numel()) < 1 for k, p in zip(first, held, strict=True))
    for seen in watched(optimizer, held, 24):
        assert seen.mask.sum() == first[seen.number]
        assert not seen.W[~seen.mask].any()
        indices = optimizer.state[held[seen.number]]["indices"]
        assert (indices.diff() > 0).all()
        assert all(len(v) == len(indices) for k, v in optimizer.state[held[seen.number]].items() if k != "step")


@by_class
@by_shape
def test_what_is_dropped_is_the_smallest_and_what_is_grown_is_zero(cls, shape):
    """Without moments; and a weight that stays has moved at an update as it would have without one."""
    held = weights(shape)
    (p,), twins = held, weights(shape)
    keys = {**ADAM, "weight_decay": 0.1, "sparsity": 0.6}
    optimizer, still = cls(held, **keys, **CLOCK), cls(twins, **keys, **{**CLOCK, "drop_fraction": 0.0})
    for t in range(4):
        for one, own in ((optimizer, held), (still, twins)):
            step(one, own, gradients(own, t))
    old, given = mask_of(optimizer, p), gradients(held, 4)
    step(optimizer, held, given)
    step(still, twins, given)
    new, moved, moments = mask_of(optimizer, p), twins[0].detach(), moments_of(optimizer, p)
    K = int(old.sum())
    n = math.floor(0.2 * (1 + math.cos(math.pi * 5 / 30)) * K)
    kept = oracle.best(moved.abs(), old, K - n)
    assert n > 2
    assert (kept & ~new).sum() == 0
    assert new.sum() == K
    assert torch.equal(p[new & old], moved[new & old])
    came = new & ~old
    assert came.any()
    assert not p[came].any()
    assert not any(m[came].any() for m in moments)
    assert all(m[new & old].all() for m in moments)
    assert optimizer.state[p]["step"] == 5


def test_rigl_grows_where_gradients_are_largest_also_what_was_dropped_just_now():
    held = weights((20, 12))
    optimizer = RigLAdamW(held, **ADAM, **CLOCK, sparsity=0.6)
    old = None
    for seen in watched(optimizer, held, 22):
        if old is not None and not torch.equal(seen.mask, old):
            n = math.floor(oracle.cosine(0.4, seen.t, 0, 30) * int(old.sum()))
            grown = seen.mask & ~oracle.best(seen.W.abs() * (old & seen.mask), old, int(old.sum()) - n)
            others = seen.G.abs()[~seen.mask]
            assert seen.G.abs()[seen.mask & ~old].min() >= others.max()
            assert grown.sum() == n
        old = seen.mask


@pytest.mark.parametrize("again", [False, True])
def test_a_weight_that_is_dropped_and_grown_at_once_stays_or_starts_anew(again):
    """The smallest weight has the largest gradient."""
    p = nn.Parameter(torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0]]))
    optimizer = RigLAdamW(
        [p], lr=0.0, sparsity=0.5, update_every=1, drop_fraction=0.5, t_end=1000, reinit_when_same=again
    )
    step(optimizer, [p], [torch.tensor([[1.0, 1.0, 0.1, 9.0, 0.2, 0.3, 0.4, 0.3]])])
    assert p.tolist() == [[3.0, 2.0, 1.0, 0.0 if again else 0.5, 0.0, 0.0, 0.0, 0.0]]
    assert optimizer.state[p]["indices"].tolist() == [0, 1, 2, 3]
    assert (optimizer.state[p]["exp_avg"] == 0).tolist() == [False, False, False, again]


# ---- random growth --------------------------------------------------------------------------------------------------


def test_set_grows_anywhere_outside_of_what_is_kept_and_as_likely_everywhere():
    """One update of a mask of 10 of 40, of which 5 go: each other place comes with a chance of 5 / 35; 200 seeds."""
    counted = torch.zeros(40)
    for seed in range(200):
        p = nn.Parameter(torch.zeros(4, 10))
        p.data.view(-1)[:10] = torch.arange(1.0, 11.0)
        keys = {"lr": 0.0, "update_every": 1, "drop_fraction": 0.55, "t_end": 1000}
        optimizer = SETAdamW([p], **keys, sparsity=0.75, seed=seed)
        step(optimizer, [p], [torch.ones(4, 10)])
        counted[optimizer.state[p]["indices"].long()] += 1
    assert (counted[5:10] == 200).all()
    others, chance = torch.cat([counted[:5], counted[10:]]) / 200, 5 / 35
    assert others.sum() == pytest.approx(5)
    assert (others - chance).abs().max() < 4.5 * math.sqrt(chance * (1 - chance) / 200)


def test_first_masks_are_as_likely_to_be_anywhere():
    counted = torch.zeros(6, 7)
    for seed in range(300):
        p = nn.Parameter(torch.ones(6, 7))
        SETAdamW([p], sparsity=0.7, t_end=10, seed=seed)
        assert p.sum() == round(0.3 * 42)
        counted += p.detach()
    chance = round(0.3 * 42) / 42
    assert (counted / 300 - chance).abs().max() < 4.5 * math.sqrt(chance * (1 - chance) / 300)


@by_class
def test_the_seed_says_what_is_drawn_and_nothing_else_does(cls):
    def run(seed, noise):
        held = weights((20, 12), (20, 12))
        torch.manual_seed(noise)
        optimizer = cls(held, **ADAM, **CLOCK, sparsity=0.8, seed=seed)
        first = [p.detach() != 0 for p in held]
        for t in range(6):
            torch.rand(noise)
            step(optimizer, held, gradients(held, t))
        return first + [mask_of(optimizer, p) for p in held]

    one, same, other = run(3, 1), run(3, 2), run(4, 1)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1]), "two matrices of one shape have masks of their own"


def test_set_draws_anew_at_every_update():
    held = weights((20, 12))
    optimizer = SETAdamW(held, **{**ADAM, "lr": 0.0}, **CLOCK, sparsity=0.5)
    masks = [seen.mask for seen in watched(optimizer, held, 12)]
    one, two = masks[5] & ~masks[0], masks[10] & ~masks[5]
    assert one.any()
    assert two.any()
    assert (one & two).sum() < one.sum()


@pytest.mark.parametrize(("cls", "grow"), [(SETAdamW, "random"), (RigLAdamW, "gradient")])
def test_both_are_sets_of_choices(cls, grow):
    runs = []
    for make in (
        lambda held, **keys: cls(held, **keys),
        lambda held, **keys: SparseAdamW(held, **keys, grow=grow, distribution="erk"),
    ):
        held = weights((20, 12), (12, 20))
        optimizer = make(held, **ADAM, **CLOCK, sparsity=0.8, seed=5)
        for t in range(16):
            step(optimizer, held, gradients(held, t))
        runs.append([p.detach() for p in held] + [optimizer.state[p]["indices"] for p in held])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- schedules ------------------------------------------------------------------------------------------------------


def test_the_drop_fraction_falls_by_a_cosine_to_zero_and_masks_stay_from_t_end_on():
    held = weights((40, 30))
    optimizer = SETAdamW(held, **ADAM, sparsity=0.5, update_every=3, drop_fraction=0.4, t_end=12)
    (group,) = optimizer.param_groups
    told = [drop_fraction_at(t, optimizer.settings(group)) for t in (0, 6, 12, 20)]
    assert told == pytest.approx([0.4, 0.2, 0.0, 0.0])
    masks = [seen.mask for seen in watched(optimizer, held, 20)]
    changes = {t + 1 for t in range(1, 20) if not torch.equal(masks[t], masks[t - 1])}
    assert changes == {3, 6, 9}
    gone = {t: int((masks[t - 2] & ~masks[t - 1]).sum()) for t in changes}
    for t, count in gone.items():
        n = math.floor(oracle.cosine(0.4, t, 0, 12) * 600)
        assert 0.5 * n < count <= n, "some come back at once"


def test_a_cosine_counts_from_t_begin_on():
    """google-research/rigl falls over t_end - t_begin steps, but from step 0 on."""
    held = weights((40, 30))
    keys = {"update_every": 5, "drop_fraction": 0.4, "t_begin": 10, "t_end": 30}
    optimizer = SparseAdamW(held, **ADAM, sparsity=0.5, **keys)
    (group,) = optimizer.param_groups
    told = [drop_fraction_at(t, optimizer.settings(group)) for t in (0, 10, 20, 25, 30)]
    assert told == pytest.approx([0.4, 0.4, 0.2, 0.2 * (1 + math.cos(0.75 * math.pi)), 0.0])
    masks = [seen.mask for seen in watched(optimizer, held, 34)]
    assert {t + 1 for t in range(1, 34) if not torch.equal(masks[t], masks[t - 1])} == {15, 20, 25}


# ---- published flaws ------------------------------------------------------------------------------------------------


def test_only_weights_of_the_mask_are_kept_though_many_of_them_are_zero():
    """Ranked with all others, a weight of zero that is there ties with those that are not."""
    p = nn.Parameter(torch.zeros(10, 12))
    p.data[5, :3] = torch.tensor([1.0, -2.0, 3.0])
    optimizer = RigLAdamW([p], lr=0.0, sparsity=0.7, update_every=1, drop_fraction=0.5, t_end=1000)
    for t in range(5):
        old = p.detach() != 0 if t == 0 else mask_of(optimizer, p)
        step(optimizer, [p], gradients([p], t))
        new = mask_of(optimizer, p)
        if t:
            kept = oracle.best(p.abs(), old, 36 - 17)  # floor(0.4999.. 36) go
            assert torch.equal(kept & new, kept)
        assert p[5, :3].tolist() == [1.0, -2.0, 3.0]


def test_a_tiny_weight_that_is_there_beats_all_zeros_that_are_not():
    """Noise of 1e-5, by which published code breaks ties, would drop it."""
    p = nn.Parameter(torch.zeros(4, 10))
    p.data[3, :4] = torch.tensor([1e-30, -1e-28, 1e-29, 1e-30])
    optimizer = RigLAdamW([p], lr=0.0, sparsity=0.9, update_every=1, drop_fraction=0.5, t_end=1000)
    G = torch.zeros(4, 10)
    G[0, 0] = 1.0
    step(optimizer, [p], [G])
    assert optimizer.state[p]["indices"].tolist() == [
        0,
        30,
        31,
        32,
    ]  # of the two smallest the later goes: floor(0.4999.. 4)


def test_where_all_gradients_are_zero_the_first_places_come():
    p = nn.Parameter(torch.zeros(2, 10))
    p.data[1, 5:] = torch.arange(1.0, 6.0)
    optimizer = RigLAdamW([p], weight_decay=0.0, sparsity=0.75, update_every=1, drop_fraction=0.55, t_end=1000)
    step(optimizer, [p], [torch.zeros(2, 10)])
    assert optimizer.state[p]["indices"].tolist() == [0, 1, 17, 18, 19]


def test_choices_do_not_see_the_scale_of_gradients():
    """As those of a scaled loss, unscaled or not."""
    runs = []
    for scale in (1.0, 2.0**12):
        held = weights((20, 12), (12, 20))
        optimizer = RigLAdamW(held, **{**ADAM, "eps": 0.0}, **CLOCK, sparsity=0.7)
        for t in range(16):
            step(optimizer, held, [scale * G for G in gradients(held, t)])
        runs.append([p.detach() for p in held])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_growth_alone_leaves_the_loss():
    """With nothing kept back but exact zeros: the weights that go are zero, so are those that come."""
    torch.manual_seed(0)
    model = nn.Linear(30, 20, bias=False)
    x = torch.randn(50, 30)
    optimizer = RigLAdamW(model.parameters(), lr=0.0, sparsity=0.5, update_every=1, drop_fraction=0.3, t_end=100)
    with torch.no_grad():
        kept = oracle.best(model.weight.abs(), model.weight != 0, 210)
        model.weight.mul_(kept)
    before = model(x).detach().clone()
    model(x).square().sum().backward()
    step(optimizer, [model.weight], [model.weight.grad])
    at = mask_of(optimizer, model.weight)
    assert (at & kept).sum() == 210
    assert at.sum() == 300
    assert torch.equal(model(x), before)
