"""The group sparse envelope: closed forms, and a proximal point that nothing near it beats."""

import itertools

import pytest
import torch

from gracile.optim.sparse.group_envelope import envelope, proximal_factors

by_k = pytest.mark.parametrize("k", [1, 3, 5])


def groups(seed=0, count=7, size=4):
    """Vectors of several sizes of norm, and weights."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(count, size, generator=generator, dtype=torch.float64)
    V *= torch.logspace(-1, 1, count, dtype=torch.float64)[torch.randperm(count, generator=generator), None]
    return V, 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)


def proximal(V, d, k, lam):
    return V * proximal_factors(V.norm(dim=1), d, k, lam)[:, None]


def searched(v, d, k):
    """E_k by enumeration: some u are 1, some follow one line, u is 0 where v is."""
    best = float("inf")
    for full in itertools.product([True, False], repeat=len(v)):
        ones = torch.tensor(full)
        left = k - int(ones.sum())
        free = (d.sqrt() * v)[~ones]
        if left < 0 or (left == 0 and free.any()):
            continue
        rest = free.sum().square() / left if len(free) and left else torch.tensor(0.0)
        if len(free) and left and (free * left / free.sum().clamp(min=1e-300)).max() > 1 + 1e-12:
            continue
        best = min(best, 0.5 * ((d * v.square())[ones].sum() + rest).item())
    return best


@pytest.mark.parametrize("seed", range(5))
def test_closed_forms(seed):
    V, d = groups(seed)
    v = V.norm(dim=1)
    torch.testing.assert_close(envelope(v, torch.ones(7), 1), 0.5 * v.sum().square())
    torch.testing.assert_close(envelope(v, d, 7), 0.5 * (d * v.square()).sum())
    sparse = v * torch.tensor([1, 0, 0, 1, 0, 1, 0])
    for k in (3, 5):
        torch.testing.assert_close(envelope(sparse, d, k), 0.5 * (d * sparse.square()).sum())
    assert envelope(0 * v, d, 2) == 0
    torch.testing.assert_close(proximal_factors(v, d, 7, 0.3), 1 / (1 + 0.3 * d))
    assert torch.equal(proximal_factors(v, d, 3, 0.0), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
@by_k
def test_the_envelope_is_the_smallest_over_all_shares(seed, k):
    V, d = groups(seed)
    assert envelope(V.norm(dim=1), d, k).item() == pytest.approx(searched(V.norm(dim=1), d, k), rel=1e-10)


@pytest.mark.parametrize(("seed", "lam"), [(0, 1e-3), (1, 0.2), (2, 3.0)])
@by_k
def test_no_perturbation_of_the_proximal_point_is_better(seed, lam, k):
    """2000 of them, of several sizes, some of one group alone and some towards zero."""
    V, d = groups(seed)
    W = proximal(V, d, k, lam)

    def objective(X):
        return 0.5 * (X - V).square().sum() + lam * envelope(X.norm(dim=1), d, k)

    best = objective(W)
    generator = torch.Generator().manual_seed(seed)
    for i in range(2000):
        noise = torch.randn(V.shape, generator=generator, dtype=torch.float64) * 10.0 ** -(i % 6)
        if i % 3 == 1:
            noise[torch.arange(7) != i % 7] = 0.0
        if i % 3 == 2:
            noise = -W * torch.rand(7, 1, generator=generator, dtype=torch.float64) * 10.0 ** -(i % 6)
        assert objective(W + noise) >= best - 1e-12 * best


@pytest.mark.parametrize("seed", range(3))
@by_k
def test_it_is_the_inverse_of_one_plus_the_slope(seed, k):
    """V - prox(V) = lam * the gradient of E_k at prox(V), by autograd through the shares where all groups live."""
    V, d = groups(seed)
    lam = 0.05
    W = proximal(V, d, k, lam).requires_grad_()
    if (W.norm(dim=1) == 0).any():
        W = W[W.norm(dim=1) > 0].detach().requires_grad_()
        V, d = V[proximal_factors(V.norm(dim=1), d, k, lam) > 0], d[proximal_factors(V.norm(dim=1), d, k, lam) > 0]
    (slope,) = torch.autograd.grad(envelope(W.norm(dim=1), d, k), W)
    torch.testing.assert_close(V - W.detach(), lam * slope, rtol=1e-6, atol=1e-9)


@by_k
def test_zero_stays_zero_and_shares_add_up(k):
    V, d = groups()
    V[2] = V[5] = 0.0
    factors = proximal_factors(V.norm(dim=1), d, k, 0.2)
    assert torch.isfinite(factors).all()
    assert not proximal(V, d, k, 0.2)[[2, 5]].any()
    shares = 0.2 * d * factors / (1 - factors)
    assert shares[V.norm(dim=1) > 0].sum().item() == pytest.approx(min(k, 5), rel=1e-10)
    assert torch.isfinite(proximal_factors(torch.zeros(4), torch.ones(4), 2, 0.2)).all()


@by_k
def test_scaling_and_order(k):
    V, d = groups(1)
    v = V.norm(dim=1)
    torch.testing.assert_close(envelope(3 * v, d, k), 9 * envelope(v, d, k))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(proximal_factors(v[order], d[order], k, 0.2), proximal_factors(v, d, k, 0.2)[order])


def test_equal_norms_share_alike_and_huge_or_tiny_ones_stay_finite():
    torch.testing.assert_close(
        proximal_factors(torch.ones(6), torch.ones(6), 3, 0.5), torch.full((6,), 0.5 / (0.5 + 0.5)).double()
    )
    for scale in (1e-30, 1e30):
        factors = proximal_factors(scale * torch.arange(1.0, 9.0), torch.full((8,), 512.0), 2, 1e-6)
        assert torch.isfinite(factors).all()
        assert factors.max() > 0.99


def test_one_step_may_leave_more_than_k_and_repeating_it_leaves_k():
    v, d = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.1]).double(), torch.ones(5)
    alive = []
    for _ in range(200):
        v = v * proximal_factors(v, d, 1, 0.1)
        alive.append(int((v > 0).sum()))
    assert alive[0] > 1
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] <= 2
