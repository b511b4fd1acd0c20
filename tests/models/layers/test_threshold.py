"""AutoSparse's layer: learned thresholds, exact budgets, and what pruned weights see of their gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from gracile.models.layers import ThresholdLinear

SHAPES = [(11, 7), (6, 17), (8, 8)]
by_shape = pytest.mark.parametrize(("m", "n"), SHAPES)


def made(m, n, dtype=torch.float64, annealed=0.0, **keys):
    """With a threshold in the middle of the weights."""
    torch.manual_seed(m * n)
    layer = ThresholdLinear(n, m, dtype=dtype, **{"s_init": math.log(0.1 / 0.9), **keys})
    with torch.no_grad():
        layer.weight.copy_(0.15 * torch.randn(m, n))
    layer.annealed.fill_(annealed)
    return layer


def batch(n, dtype=torch.float64):
    return torch.randn(5, n, generator=torch.Generator().manual_seed(n)).to(dtype)


def backward(layer):
    """The gradients, and that of a dense weight in the place of W~."""
    x = batch(layer.in_features, layer.weight.dtype)
    layer(x).pow(3).sum().backward()
    W = layer.dense().requires_grad_()
    F.linear(x, W, layer.bias).pow(3).sum().backward()
    return layer.weight.grad, layer.s.grad if layer.s is not None else None, W.grad


def shrunk(W, theta):
    """Element by element."""
    rows = [[math.copysign(max(abs(w) - theta, 0.0), w) for w in row] for row in W.tolist()]
    return torch.tensor(rows, dtype=W.dtype)


@by_shape
def test_the_weight_is_shrunk_towards_zero_by_the_threshold(m, n):
    layer = made(m, n)
    torch.testing.assert_close(layer.dense(), shrunk(layer.weight.detach(), 0.1), rtol=1e-12, atol=1e-12)
    density = (layer.dense() != 0).double().mean()
    assert 0.2 < density < 0.8


@by_shape
@pytest.mark.parametrize("annealed", [0.0, 0.3, 1.0])
def test_pruned_weights_see_a_part_of_their_gradient(m, n, annealed):
    layer = made(m, n, annealed=annealed)
    got, of_s, G = backward(layer)
    alive = layer.weight.abs() > 0.1
    h = torch.where(alive, 1.0, annealed * torch.ones_like(G))
    torch.testing.assert_close(got, G * h, rtol=1e-12, atol=1e-12)
    assert bool(got[~alive].any()) == (annealed > 0)
    expected = -0.1 * 0.9 * (G * layer.weight.detach().sign() * h).sum()
    torch.testing.assert_close(of_s, expected.view(1), rtol=1e-10, atol=1e-12)


@by_shape
def test_where_nothing_is_pruned_gradients_are_those_of_autograd(m, n):
    layer = made(m, n, annealed=0.4)
    with torch.no_grad():
        layer.weight.add_(layer.weight.sign(), alpha=0.2)
    W, s = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.s))
    F.linear(batch(n), W - s.sigmoid() * W.sign().detach(), layer.bias).pow(3).sum().backward()
    of_weight, of_s, _ = backward(layer)
    torch.testing.assert_close((of_weight, of_s), (W.grad, s.grad), rtol=1e-10, atol=1e-12)


def test_the_gradient_of_s_is_the_slope_of_the_loss():
    """By finite differences, with a = 0: weights on one side of the threshold stay there."""
    layer, h = made(9, 6), 1e-6
    x = batch(6)
    layer(x).pow(3).sum().backward()
    losses = []
    for shift in (h, -2 * h):
        with torch.no_grad():
            layer.s.add_(shift)
            losses.append(layer(x).pow(3).sum().item())
    assert layer.s.grad.item() == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-5)


def test_raising_s_prunes_more():
    layer, densities = made(30, 20), []
    for s in (-20.0, -5.0, -2.2, -1.5, 3.0):
        with torch.no_grad():
            layer.s.fill_(s)
        densities.append((layer.dense() != 0).double().mean().item())
    assert densities == sorted(densities, reverse=True)
    assert densities[0] == 1.0
    assert densities[-1] == 0.0


def test_decay_alone_raises_the_threshold_towards_a_half():
    layer = made(6, 6, s_init=-5.0)
    optimizer = torch.optim.AdamW([layer.s], lr=0.1, weight_decay=1.0)
    for _ in range(100):
        layer.s.grad = torch.zeros(1, dtype=torch.float64)
        optimizer.step()
    assert layer.threshold().item() == pytest.approx(0.5, abs=1e-3)


def test_the_sum_for_s_is_wide_where_the_pass_is_narrow():
    """2^14 equal terms: in bf16 a sum of ones stops at 256."""
    layer = ThresholdLinear(128, 128, bias=False, dtype=torch.bfloat16, s_init=-5.0)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    layer(torch.ones(1, 128, dtype=torch.bfloat16)).sum().backward()
    sigma = 1 / (1 + math.exp(5))
    assert layer.s.grad.item() == pytest.approx(-sigma * (1 - sigma) * 2**14, rel=0.01)


# ---- a fixed budget -------------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_budget_is_exact_and_ties_go_to_the_lowest_index(m, n, sparsity, dtype):
    layer = made(m, n, dtype, sparsity=sparsity)
    with torch.no_grad():
        layer.weight.copy_((layer.weight * 20).round() / 20)  # many tie
        layer.weight[layer.weight == 0] = 0.05
    flat = layer.weight.detach().reshape(-1).tolist()
    kept = m * n - int(round(sparsity * m * n * 1e6) // 10**6)
    order = sorted(range(m * n), key=lambda i: (-abs(flat[i]), i))[:kept]
    expected = torch.zeros(m * n, dtype=dtype)
    expected[order] = layer.weight.detach().view(-1)[order]
    assert torch.equal(layer.dense(), expected.view(m, n))
    assert layer.s is None


@pytest.mark.parametrize("annealed", [0.0, 0.3, 1.0])
def test_at_a_budget_pruned_weights_see_a_part_of_their_gradient(annealed):
    layer = made(11, 7, sparsity=0.6, annealed=annealed)
    got, _, G = backward(layer)
    h = torch.where(layer.dense() != 0, 1.0, annealed * torch.ones_like(G))
    torch.testing.assert_close(got, G * h, rtol=1e-12, atol=1e-12)


def test_a_pruned_weight_can_come_back():
    """It grows by a part of its gradient, and takes another's place."""
    layer = ThresholdLinear(2, 1, bias=False, sparsity=0.5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.1]]))
    layer.annealed.fill_(0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    for _ in range(50):
        optimizer.zero_grad()
        (layer(torch.tensor([[0.0, 1.0]])) - 3.0).square().sum().backward()
        optimizer.step()
    assert layer.dense()[0, 0] == 0
    assert layer.dense()[0, 1].item() == pytest.approx(3.0, abs=1e-3)


# ---- the ceiling ----------------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_least_density_is_kept_and_the_loss_can_still_lower_s(m, n, dtype):
    layer = made(m, n, dtype, s_init=3.0).train()
    layer.least, layer.counts = math.ceil(0.1 * m * n), True
    layer(batch(n, dtype)).float().pow(3).sum().backward()
    kept = int((layer.weight.abs().to(layer.threshold().dtype) > layer.threshold()).sum())
    assert layer.least <= kept == int(layer.kept) <= layer.least + 2
    assert layer.s.grad.item() != 0
    with torch.no_grad():
        layer.s.fill_(-4.0)
    assert layer.threshold().item() == pytest.approx(1 / (1 + math.exp(4)), rel=0.02), "below its ceiling it is free"


def test_it_counts_in_training_and_when_asked():
    layer = made(6, 5)
    layer.kept.fill_(-1)
    layer(batch(5))
    assert layer.kept == -1
    layer.counts = True
    layer.eval()(batch(5))
    assert layer.kept == -1
    layer.train()(batch(5))
    assert layer.kept == (layer.dense() != 0).sum()
    assert layer.ceiling == 1.0


def test_a_ceiling_is_saved_with_the_weights():
    layer = made(6, 5, s_init=3.0)
    layer.least, layer.counts = 4, True
    layer(batch(5))
    twin = made(6, 5)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.dense(), layer.dense())
    assert layer.ceiling < 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\) or None, got 1.0"),
        ({"sparsity": "half"}, r"sparsity must be a number in \[0, 1\) or None, got 'half'"),
        ({"s_init": float("inf")}, "s_init must be a finite number, got inf"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ThresholdLinear(3, 2, **keys)
