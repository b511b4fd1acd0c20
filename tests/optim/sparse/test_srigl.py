"""SRigL beside a dense loop over rows: as many weights in each, rows that are ablated and come back, and flaws."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gracile.models.layers import CondensedLinear
from gracile.optim import SparseAdamW, SRigLAdamW
from tests.oracle import sparse as oracle

SHAPES = {"tall": (30, 12), "wide": (12, 30), "square": (20, 20), "kernel": (8, 4, 3, 3)}
ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
CLOCK = {"update_every": 4, "drop_fraction": 0.4, "t_end": 30}
SOLO = {"lr": 0.0, "update_every": 1, "t_end": 1000}

by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_gamma = pytest.mark.parametrize("gamma", [0, 0.3, 0.95, 2, 3.5])


def weights(*shapes, dtype=torch.float32):
    """Rows of different sizes: some are ablated."""
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    scales = [torch.logspace(-1.5, 0.3, len(W), dtype=torch.float64) for W in dense]
    return [nn.Parameter((W * s.view(-1, *[1] * (W.dim() - 1))).to(dtype)) for W, s in zip(dense, scales, strict=True)]


def gradients(held, t):
    """Of rows of different sizes, which change places: ablated ones come back."""
    generator = torch.Generator().manual_seed(1000 + t)
    found = []
    for p in held:
        G = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        by_row = torch.logspace(-1.5, 0, len(G), dtype=torch.float64).roll(3 * t)
        found.append((G * by_row.view(-1, *[1] * (G.dim() - 1))).to(p.dtype))
    return found


def step(optimizer, held, given):
    for p, G in zip(held, given, strict=True):
        p.grad = G.clone()
    optimizer.step()


def mask_of(optimizer, p):
    """A matrix."""
    mask = torch.zeros(p.numel(), dtype=torch.bool)
    mask[optimizer.state[p]["indices"].long()] = True
    return mask.view(p.shape[0], -1)


def watched(optimizer, held, steps):
    for t in range(steps):
        given = gradients(held, t)
        step(optimizer, held, given)
        for p, G in zip(held, given, strict=True):
            yield SimpleNamespace(t=t + 1, p=p, mask=mask_of(optimizer, p), W=p.detach().flatten(1), G=G.flatten(1))


def assert_rows(mask, budget):
    """Every row has k weights or none, and of the budget less is left over than a weight a row."""
    counts = mask.sum(1)
    active, k = int((counts > 0).sum()), int(counts.max())
    assert set(counts.tolist()) <= {0, k}
    assert k <= mask.shape[1]
    assert active * k <= budget
    assert active * k > budget - active
    return active, k


# ---- beside the dense loop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("names", [("tall", "wide"), ("square", "kernel")], ids=" ".join)
@by_gamma
def test_it_is_the_dense_loop(names, dtype, gap, gamma):
    """25 steps with six updates."""
    held = weights(*(SHAPES[name] for name in names), dtype=dtype)
    start = [p.detach().flatten(1).clone() for p in held]
    keys = {"sparsity": 0.7, "distribution": "uniform", "gamma_sal": gamma}
    optimizer = SRigLAdamW(held, **ADAM, **CLOCK, **keys, weight_decay=0.1)
    sizes = [p.numel() for p in held]
    budgets = [math.floor((1 - 0.7) * size) for size in sizes]
    budgets[0] += round((1 - 0.7) * sum(sizes)) - sum(budgets)  # the first has the larger fraction

    def change(number, W, M, G, fraction, t):
        return oracle.srigl(W, M, G, fraction, budgets[number], gamma)

    reference = oracle.Sparse(
        start, [p.detach().flatten(1) != 0 for p in held], change,
        **ADAM, decay=0.1, every=4, fraction=0.4, end=30,
    )  # fmt: skip
    actives = set()
    for t in range(25):
        given = gradients(held, t)
        step(optimizer, held, given)
        reference.step([G.flatten(1) for G in given])
        for p, W, M, moments, budget in zip(
            held, reference.weights, reference.masks, reference.moments, budgets, strict=True
        ):
            assert torch.equal(mask_of(optimizer, p), M)
            assert (p.detach().flatten(1).double() - W).abs().max() <= gap
            state = optimizer.state[p]
            for key, expected in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                assert (state[key].double() - expected[M]).abs().max() <= gap
            actives.add(assert_rows(M, budget)[0] / len(M))
    if gamma in (0, 0.95, 3.5):
        assert (min(actives) < 1) == (gamma > 0)


# ---- rows -----------------------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_first_every_row_has_as_many_weights_wherever_they_are(shape, dtype):
    held = weights(shape, dtype=dtype)
    SRigLAdamW(held, sparsity=0.7, t_end=9)
    m, numel = shape[0], held[0].numel()
    counts = (held[0] != 0).flatten(1).sum(1)
    assert (counts == round(0.3 * numel) // m).all()
    other = weights(shape, dtype=dtype)
    SRigLAdamW(other, sparsity=0.7, t_end=9, seed=1)
    assert not torch.equal(other[0] != 0, held[0] != 0)


def test_each_column_of_a_row_is_as_likely_at_first():
    counted = torch.zeros(5, 12)
    for seed in range(300):
        p = nn.Parameter(torch.ones(5, 12))
        SRigLAdamW([p], sparsity=0.75, t_end=9, seed=seed)
        counted += p.detach()
    assert (counted / 300 - 0.25).abs().max() < 4.5 * math.sqrt(0.25 * 0.75 / 300)


@by_shape
@by_gamma
def test_rows_that_stay_have_as_many_weights_at_every_step(shape, gamma):
    held = weights(shape, dtype=torch.bfloat16)
    budget = round(0.25 * held[0].numel())
    optimizer = SRigLAdamW(held, **ADAM, **CLOCK, sparsity=0.75, gamma_sal=gamma, weight_decay=0.1)
    for seen in watched(optimizer, held, 28):
        active, k = assert_rows(seen.mask, budget)
        assert not seen.W[~seen.mask].any()
        if gamma == 0:
            assert (active, k) == (shape[0], budget // shape[0])


def test_rows_come_back_with_weights_of_zero():
    held = weights((30, 12))
    optimizer = SRigLAdamW(held, **ADAM, **CLOCK, sparsity=0.7, gamma_sal=0.95)
    ablated, revived = torch.zeros(30, dtype=torch.bool), 0
    for seen in watched(optimizer, held, 28):
        active = seen.mask.any(1)
        back = ablated & active
        assert not seen.W[back].any()
        revived += int(back.sum())
        ablated = ~active
    assert revived > 3


def test_a_place_that_is_large_in_weight_and_in_gradient_counts_once():
    """Of 8 weights 2 go; the third row's one salient weight has the largest gradient, too, and 2 are asked for."""
    p = nn.Parameter(torch.zeros(4, 8))
    p.data[:, 0], p.data[:, 1] = 5.0, torch.tensor([4.0, 4.0, 0.1, 0.2])
    optimizer = SRigLAdamW([p], **SOLO, sparsity=0.75, gamma_sal=2, drop_fraction=0.3)
    G = torch.zeros(4, 8)
    G[2, 0] = G[0, 5] = 1.0
    step(optimizer, [p], [G])
    assert mask_of(optimizer, p).sum(1).tolist() == [4, 4, 0, 0]


def test_a_fan_in_is_never_above_the_columns():
    """All of what is salient lies in two rows of ten; of 40 weights they could not have 20 each."""
    p = nn.Parameter(0.01 * torch.rand(10, 10, generator=torch.Generator().manual_seed(0)) + 0.01)
    p.data[:2] += 1
    optimizer = SRigLAdamW([p], **SOLO, sparsity=0.6, gamma_sal=0.99, drop_fraction=0.9)
    G = torch.full((10, 10), 1e-3)
    G[:2] = 1.0
    for _ in range(4):
        step(optimizer, [p], [G])
        active, k = assert_rows(mask_of(optimizer, p), 40)
        assert k <= 10
    assert active >= 5, "40 // 10 rows would do, and one more is asked for"


def test_a_classifier_without_gamma_keeps_all_rows_in_a_group_of_its_own():
    held = weights((30, 12), (30, 12))
    groups = [{"params": held[:1]}, {"params": held[1:], "gamma_sal": 0}]
    optimizer = SRigLAdamW(groups, **ADAM, **CLOCK, sparsity=0.7, gamma_sal=0.95)
    for t in range(28):
        step(optimizer, held, gradients(held, t))
        assert mask_of(optimizer, held[1]).any(1).all()
    assert not mask_of(optimizer, held[0]).any(1).all()


def test_rows_are_kept_condensed():
    held = weights((30, 12))
    optimizer = SRigLAdamW(held, **ADAM, **CLOCK, sparsity=0.7, gamma_sal=0.95)
    for t in range(13):
        step(optimizer, held, gradients(held, t))
    linear = nn.Linear(12, 30)
    linear.weight.data.copy_(held[0].detach())
    condensed = CondensedLinear.from_linear(linear)
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(condensed(x), linear(x), rtol=1e-6, atol=1e-6)


# ---- published flaws ------------------------------------------------------------------------------------------------


def test_a_row_with_more_than_its_share_keeps_the_largest():
    """calgaryml/condensed-sparsity sorts whether a weight is there, not how large it is."""
    p = nn.Parameter(torch.zeros(4, 12))
    p.data[0, :6] = torch.tensor([1.0, 6.0, 2.0, -5.0, 3.0, 4.0])
    p.data[1, 3:6] = torch.tensor([0.1, 0.1, 0.2])
    p.data[2, 3:6] = torch.tensor([0.1, 0.1, 0.2])
    optimizer = SparseAdamW(
        [p], **SOLO, sparsity=0.75, structure="constant_fan_in", gamma_sal=0, drop_fraction=0.0, schedule="constant"
    )
    step(optimizer, [p], [torch.ones(4, 12)])
    # a mask of 12 that is not even, as another method would leave it
    state = optimizer.state[p]
    state["indices"] = torch.tensor([0, 1, 2, 3, 4, 5, 15, 16, 17, 27, 28, 29], dtype=torch.int32)
    p.data.zero_()
    p.data[0, :6] = torch.tensor([1.0, 6.0, 2.0, -5.0, 3.0, 4.0])
    p.data[1, 3:6] = p.data[2, 3:6] = torch.tensor([0.1, 0.1, 0.2])
    optimizer.param_groups[0]["drop_fraction"] = 0.05
    G = torch.zeros(4, 12)
    G[3] = torch.arange(12.0)
    step(optimizer, [p], [G])
    mask = mask_of(optimizer, p)
    assert mask[0].nonzero().view(-1).tolist() == [1, 3, 5]
    assert mask[3].nonzero().view(-1).tolist() == [9, 10, 11]
    assert p[0].tolist() == [0.0, 6.0, 0.0, -5.0, 0.0, 4.0] + [0.0] * 6


def test_a_row_whose_weights_cancel_is_there():
    """Published code finds rows by ``weight.sum(dim=1) != 0``."""
    p = nn.Parameter(torch.zeros(4, 8))
    p.data[:, 2], p.data[:, 5] = 1.0, -1.0
    p.data[3] = 0  # this one is ablated
    before = p.detach().clone()
    optimizer = SRigLAdamW([p], **SOLO, sparsity=0.75, drop_fraction=0.0)
    assert torch.equal(p, before)
    step(optimizer, [p], [torch.ones(4, 8)])
    assert mask_of(optimizer, p).any(1).tolist() == [True, True, True, False]


def test_a_weight_of_zero_that_is_there_counts():
    """Grown a moment ago: found by ``nonzero``, its row would grow another one."""
    p = nn.Parameter(torch.zeros(6, 10))
    p.data[:, 0] = torch.arange(1.0, 7.0)
    optimizer = SRigLAdamW([p], **SOLO, sparsity=0.5, gamma_sal=0, drop_fraction=0.4)
    for t in range(5):
        step(optimizer, [p], gradients([p], t))
        assert (mask_of(optimizer, p).sum(1) == 5).all()
        assert p.count_nonzero() == 6


# ---- weights that were trained --------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [None, "magnitude"])
def test_a_trained_model_keeps_its_weights_and_its_ablated_rows(init):
    trained = weights((30, 12))
    keys = {"sparsity": 0.7, "gamma_sal": 0.95}
    optimizer = SRigLAdamW(trained, **ADAM, **CLOCK, **keys)
    for t in range(14):
        step(optimizer, trained, gradients(trained, t))
    active = mask_of(optimizer, trained[0]).any(1)
    assert 0 < int(active.sum()) < 30
    held = [nn.Parameter(trained[0].detach().clone())]
    again = SRigLAdamW(held, **{**ADAM, "lr": 0.0}, **CLOCK, **keys, init=init)
    assert torch.equal(held[0], trained[0])
    step(again, held, gradients(held, 0))
    assert torch.equal(held[0], trained[0])
    assert torch.equal(mask_of(again, held[0]), mask_of(optimizer, trained[0]))


def test_without_gamma_a_row_of_zeros_is_a_row():
    p = nn.Parameter(torch.ones(10, 10))
    p.data[3] = 0
    optimizer = SRigLAdamW([p], sparsity=0.8, gamma_sal=0, drop_fraction=0.0)
    step(optimizer, [p], [torch.ones(10, 10)])
    assert (mask_of(optimizer, p).sum(1) == 2).all()


def test_a_matrix_with_few_rows_that_are_not_zero_is_not_a_trained_one():
    """They cannot hold all weights that stay."""
    p = nn.Parameter(torch.zeros(10, 10))
    p.data[4] = 1
    optimizer = SRigLAdamW([p], sparsity=0.8, t_end=9)
    step(optimizer, [p], [torch.ones(10, 10)])
    assert (mask_of(optimizer, p).sum(1) == 2).all()


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_less_than_a_weight_a_row_is_refused():
    with pytest.raises(ValueError, match=r"leaves 36 weights to the 40 rows of a matrix of shape \(40, 9\)"):
        SRigLAdamW(weights((40, 9)), sparsity=0.9, t_end=9)
    SRigLAdamW(weights((40, 9)), sparsity=0.8, t_end=9)


@pytest.mark.parametrize("gamma", [-0.1, float("nan"), "0.3", True])
def test_a_bad_gamma_is_refused(gamma):
    with pytest.raises(ValueError, match=f"gamma_sal must be a number >= 0, got {gamma!r}"):
        SRigLAdamW(weights((20, 20)), sparsity=0.5, t_end=9, gamma_sal=gamma)
