"""Maestro's layer: prefixes are the best of their rank, and the penalty is the paper's."""

import pytest
import torch
from torch import nn

from gracile.models.layers import OrderedLowRankLinear


def made(m=10, n=14, **keys):
    torch.manual_seed(0)
    linear = nn.Linear(n, m, dtype=torch.float64)
    return linear, OrderedLowRankLinear.from_linear(linear, **keys)


@pytest.mark.parametrize("width", [1, 4, 10])
def test_a_prefix_is_the_best_of_its_rank(width):
    linear, layer = made()
    layer.sampled = width
    U, sigma, Vh = torch.linalg.svd(linear.weight, full_matrices=False)
    best = (U[:, :width] * sigma[:width]) @ Vh[:width]
    x = torch.randn(5, 14, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ best.T + linear.bias)
    layer.eval()  # what is sampled is for training
    torch.testing.assert_close(layer(x), linear(x))


def test_components_beyond_have_no_gradient():
    _, layer = made()
    layer.sampled = 3
    layer(torch.randn(5, 14, dtype=torch.float64)).sum().backward()
    for p in (layer.U, layer.V):
        assert p.grad[:, :3].all()
        assert not p.grad[:, 3:].any()


def test_the_penalty_of_two_identities():
    layer = OrderedLowRankLinear(2, 2, rank=2)
    for p in (layer.U, layer.V):
        p.data = torch.eye(2)
    torch.testing.assert_close(layer.penalty(), torch.tensor(2 * (2**0.5 + 1)))
    layer.penalty().backward()
    assert layer.U.grad.diagonal().tolist() == pytest.approx([2**-0.5, 2**-0.5 + 1])


def test_the_penalty_is_smooth_where_all_is_zero():
    layer = OrderedLowRankLinear(3, 3)
    for p in (layer.U, layer.V):
        nn.init.zeros_(p)
    layer.penalty().backward()
    assert torch.isfinite(layer.U.grad).all()


def test_it_shrinks_to_what_matters_and_stays_so(tmp_path):
    _, layer = made()
    with torch.no_grad():
        layer.U[:, 6:] *= 1e-6
    before = layer.dense()
    assert layer.shrink(1e-4) == layer.width == 6
    torch.testing.assert_close(layer.dense(), before, rtol=1e-4, atol=1e-4)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    _, loaded = made()
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert loaded.width == 6
    assert torch.equal(loaded.dense(), layer.dense())
    assert layer.shrink(2.0) == 1, "one is left"


def test_an_absolute_threshold():
    _, layer = made()
    with torch.no_grad():
        layer.U.mul_(1e-9)
    assert layer.shrink(1e-5) == 10
    assert layer.shrink(1e-5, relative=False) == 1


def test_fewer_components_from_the_start():
    _, layer = made(rank=4)
    assert layer.U.shape == (10, 4)
    with pytest.raises(ValueError, match="rank must be a whole number from 1 to 10 here, or None, got 11"):
        made(rank=11)
