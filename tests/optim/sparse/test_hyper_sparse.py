"""HyperSparse: the penalty's gradient, its bound over all weights, and pruning once, exactly."""

import math

import pytest
import torch
from torch import nn

from gracile.optim import HyperSparseAdamW
from gracile.optim.distributed import FullShard
from gracile.optim.distributed.workspace import Workspace
from gracile.optim.sparse.hyper_sparse import BEND, penalty_gradient
from gracile.optim.sparse.prune_smallest import nth_smallest, prune_smallest_, value_of

SHAPES = [(12, 5), (5, 12), (8, 8)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "bf16"])


def weights(*shapes, seed=0, dtype=torch.float64, coarse=False):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(((W * 4).round() / 4 if coarse else W).to(dtype)) for W in drawn]


def shards(held):
    return [FullShard(p.data, i, Workspace()) for i, p in enumerate(held)]


def give_gradients(held, t):
    generator = torch.Generator().manual_seed(100 + t)
    for p in held:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def advance(optimizer, held, first, last):
    for t in range(first, last):
        give_gradients(held, t)
        optimizer.step()


def zeros(held):
    return sum(int((p == 0).sum()) for p in held)


def together(held):
    return torch.cat([p.detach().reshape(-1) for p in held])


def sharpness_of(w, kappa):
    """The authors' way, by sorting."""
    return BEND / w.abs().sort().values[math.ceil(kappa * len(w)) - 1]


def penalty(w, s):
    """As the authors write it, a loss."""
    h = torch.tanh(s * w.abs())
    return (w.abs() * h.sum() / h.sum().detach()).sum() - w.abs().sum()


# ---- the penalty ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.5, 0.9])
def test_the_gradient_is_that_of_a_loss_that_is_always_zero(kappa):
    w = together(weights(*SHAPES)).requires_grad_()
    s = sharpness_of(w.detach(), kappa)
    loss = penalty(w, s)
    loss.backward()
    h = torch.tanh(s * w.detach().abs())
    R = penalty_gradient(w, s, w.detach().abs().sum() / h.sum())
    assert abs(loss.item()) < 1e-12
    torch.testing.assert_close(R, w.grad, rtol=1e-12, atol=1e-14)


def test_it_pulls_at_small_weights_both_ways_alike_and_leaves_large_ones_alone():
    w = torch.linspace(0.01, 8, 400, dtype=torch.float64)
    s, one = torch.tensor(BEND / 2.0).double(), torch.tensor(1.0).double()
    R = penalty_gradient(w, s, one)
    torch.testing.assert_close(penalty_gradient(-w, s, one), -R, rtol=0, atol=0)
    assert (R[1:] < R[:-1]).all()
    assert R[0] == pytest.approx(s.item(), rel=1e-3)
    assert R[-1] < 0.03 * R[0]
    slopes = R[1:] - R[:-1]
    assert w[slopes.argmin()] == pytest.approx(2.0, abs=0.03), "it falls fastest at the quantile"
    assert penalty_gradient(torch.zeros(2), s, one).tolist() == [0, 0]


@by_dtype
@pytest.mark.parametrize("n", [1, 7, 60, 100, 184])
def test_the_nth_smallest_is_that_of_a_sort(dtype, n):
    held = weights(*SHAPES, dtype=dtype, coarse=n % 2 == 0)
    key, rank = nth_smallest(shards(held), torch.tensor(n))
    ordered = together(held).abs().double().sort().values
    assert value_of(key, shards(held)) == ordered[n - 1]
    assert rank == n - int((ordered < ordered[n - 1]).sum())


def test_tensors_of_several_dtypes_are_one_vector():
    held = weights(SHAPES[0], dtype=torch.float64) + weights(SHAPES[1], dtype=torch.bfloat16, seed=1)
    key, _ = nth_smallest(shards(held), torch.tensor(50))
    both = torch.cat([p.detach().double().reshape(-1) for p in held])
    assert value_of(key, shards(held)) == both.abs().sort().values[49]


# ---- pruning --------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("n", [0, 1, 31, 92, 183])
def test_exactly_so_many_go_and_ties_stay_from_the_lowest_index_on(dtype, n):
    held = weights(*SHAPES, dtype=dtype, coarse=True)
    w = together(held)
    order = sorted(range(len(w)), key=lambda i: (-abs(w[i].item()), i))[: len(w) - n]
    kept = torch.zeros(len(w), dtype=torch.bool)
    kept[order] = True
    prune_smallest_(shards(held), torch.tensor(n))
    after = together(held)
    assert torch.equal(after != 0, kept)
    assert torch.equal(after[kept & (w != 0)], w[kept & (w != 0)])
    assert (after[kept & (w == 0)].abs() < 1e-30).all()


def test_a_zero_that_stays_is_not_taken_for_one_that_went():
    (p,) = weights((4, 4))
    p.data[0] = 0.0
    prune_smallest_(shards([p]), torch.tensor(2))
    assert zeros([p]) == 2
    assert ((p[0] == 0) | (p[0].abs() < 1e-30)).all()
    assert (p[0, 2:] == 0).all()


@by_dtype
def test_after_pruning_zeros_stay_zero_and_no_other_joins_them(dtype):
    held = weights(*SHAPES, (7,), dtype=dtype)
    plain = weights((3, 3), dtype=dtype, seed=2)
    optimizer = HyperSparseAdamW(
        [{"params": held, "sparsity": 0.7}, {"params": plain}], lr=0.25, prune_at=4, weight_decay=0.1
    )
    advance(optimizer, [*held, *plain], 0, 3)
    assert zeros(held) == 0
    advance(optimizer, [*held, *plain], 3, 4)
    count = sum(p.numel() for p in held)
    assert zeros(held) == math.floor(0.7 * count)
    where, moved = together(held) == 0, together(held)
    advance(optimizer, [*held, *plain], 4, 60)
    assert torch.equal(together(held) == 0, where)
    assert not torch.equal(together(held)[~where], moved[~where])
    assert zeros(plain) == 0


def test_a_weight_that_lands_on_zero_is_not_lost():
    p = nn.Parameter(torch.tensor([[0.5, 2.0], [0.1, 3.0]]))
    optimizer = HyperSparseAdamW([p], lr=0.5, betas=(0.0, 0.0), eps=0.0, sparsity=0.25, hs_lambda=0.0, prune_at=1)
    p.grad = torch.zeros(2, 2)
    optimizer.param_groups[0]["eps"] = 1.0
    optimizer.step()
    assert p.tolist() == [[0.5, 2.0], [0.0, 3.0]]
    optimizer.param_groups[0]["eps"] = 0.0
    p.grad = torch.ones(2, 2)
    optimizer.step()  # by lr, the sign of the gradient
    assert 0 < p[0, 0] < 1e-30
    p.grad = -torch.ones(2, 2)
    optimizer.step()
    assert p.tolist() == [[0.5, 2.0], [0.0, 3.0]]


def test_finish_prunes_now_and_once():
    held = weights(*SHAPES)
    optimizer = HyperSparseAdamW(held, sparsity=0.5, prune_at=50)
    advance(optimizer, held, 0, 3)
    optimizer.finish()
    w = together(held)
    assert int((w == 0).sum()) == 92
    assert optimizer.is_pruned(optimizer.param_groups[0])
    optimizer.finish()
    assert torch.equal(together(held), w)
    advance(optimizer, held, 3, 53)
    assert torch.equal(together(held) == 0, w == 0)


def test_to_finish_before_the_first_step_is_refused():
    with pytest.raises(RuntimeError, match="finish comes after the first step"):
        HyperSparseAdamW(weights((3, 3)), sparsity=0.5).finish()


def test_groups_are_ranked_by_themselves():
    first, second = weights((6, 6)), [nn.Parameter(100 * p.data) for p in weights((5, 4), seed=1)]
    groups = [{"params": first, "sparsity": 0.5}, {"params": second, "sparsity": 0.25}]
    optimizer = HyperSparseAdamW(groups, prune_at=1)
    advance(optimizer, first + second, 0, 1)
    assert (zeros(first), zeros(second)) == (18, 5)


# ---- whole steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "growth"), [(1, 1.5), (3, 1.0)])
def test_it_is_adamw_on_the_penalised_gradient(every, growth):
    """Against torch's AdamW fed with G + lam R by the authors' sort; penalty from step 2 on, stronger every 2 steps."""
    held, twins = weights(*SHAPES), weights(*SHAPES)
    keys = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}
    own = {"sparsity": 0.8, "hs_lambda": 0.3, "hs_growth": growth, "interval": 2, "warmup_steps": 2}
    optimizer = HyperSparseAdamW(held, **keys, **own, quantile_every=every)
    plain = torch.optim.AdamW(twins, **keys)
    for t in range(12):
        give_gradients(held, t)
        give_gradients(twins, t)
        w = together(twins)
        if t >= 2:
            if (t - 2) % every == 0:
                exact = sharpness_of(w, 0.8)
                quotient = w.abs().sum() / torch.tanh(exact * w.abs()).sum()
                s, quotient = exact.float().double(), quotient.float().double()  # as state holds them
            for p in twins:
                lam = 0.3 * growth ** ((t - 2) // 2)
                h = torch.tanh(s * p.detach().abs())
                p.grad += lam * p.detach().sign() * s * (1 - h**2) * quotient
        optimizer.step()
        plain.step()
        torch.testing.assert_close(together(held), together(twins), rtol=1e-9, atol=1e-10)


def test_without_a_sparsity_it_is_adamw():
    held, twins = weights(*SHAPES), weights(*SHAPES)
    advance(HyperSparseAdamW(held, lr=0.01), held, 0, 5)
    advance(torch.optim.AdamW(twins, lr=0.01, weight_decay=0.0), twins, 0, 5)
    torch.testing.assert_close(together(held), together(twins), rtol=1e-12, atol=1e-14)


def test_it_squeezes_a_model_into_its_largest_weights():
    """Least squares with a sparse truth: pruning hurts far less with the penalty than without."""
    losses = {}
    for strength in (0.0, 1e-3):
        torch.manual_seed(0)
        X = torch.randn(100, 60)
        truth = torch.randn(60) * (torch.arange(60) < 12)
        y = X @ truth + 0.5 * torch.randn(100)
        w = nn.Parameter(0.3 * torch.randn(1, 60))
        optimizer = HyperSparseAdamW(
            [w], lr=0.01, sparsity=0.8, hs_lambda=strength, hs_growth=1.05, interval=10, quantile_every=5
        )
        for _ in range(800):
            optimizer.zero_grad()
            (X @ w[0] - y).square().mean().backward()
            optimizer.step()
        before = w.detach().abs().sort().values[0, :48].sum()
        optimizer.finish()
        losses[strength] = (before.item(), (X @ w[0] - y).square().mean().item())
    assert losses[1e-3][0] < 0.2 * losses[0.0][0]
    assert losses[1e-3][1] < losses[0.0][1]


def test_a_model_of_zeros_stays_finite():
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = HyperSparseAdamW([p], sparsity=0.5, hs_lambda=1.0)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.isfinite(p).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sparsity": 1}, r"sparsity must be a number in \[0, 1\) or None, got 1"),
        ({"hs_lambda": -1}, "hs_lambda must be a number >= 0, got -1"),
        ({"hs_growth": 0}, "hs_growth must be a number > 0, got 0"),
        ({"interval": 0}, "interval must be a whole number >= 1, got 0"),
        ({"quantile_every": 1.5}, "quantile_every must be a whole number >= 1, got 1.5"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number >= 0, got -1"),
        ({"prune_at": 0}, "prune_at must be a whole number >= 1 or None, got 0"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        HyperSparseAdamW(weights((3, 3)), **keys)
