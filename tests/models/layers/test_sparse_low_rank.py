"""SLTrain's layer: its places, and its passes against the dense expression."""

import pytest
import torch

from gracile.models.layers import SparseLowRankLinear
from gracile.models.layers.sparse_low_rank import places


def dense_expression(layer, x):
    W = layer.alpha / layer.rank * layer.B @ layer.A
    W = W.flatten().index_put((layer.support.long(),), layer.values, accumulate=True).view_as(W)
    return x @ W.T + layer.bias


@pytest.mark.parametrize(("m", "n", "rank"), [(13, 7, 4), (5, 21, 2), (9, 9, 9)])
@pytest.mark.parametrize("density", [0.0, 0.07, 0.6, 1.0])
def test_passes_are_those_of_the_dense_expression(m, n, rank, density):
    torch.manual_seed(0)
    layer = SparseLowRankLinear(n, m, rank=rank, alpha=5.0, density=density, dtype=torch.float64)
    torch.nn.init.normal_(layer.B)
    x = torch.randn(2, 6, n, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 6, m, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    one, other = layer(x), dense_expression(layer, x)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for found, expected in zip(
        torch.autograd.grad(one, wanted, dy), torch.autograd.grad(other, wanted, dy), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_start_is_the_papers():
    """B is zero; the values and A are bounded by 1 / sqrt(n)."""
    layer = SparseLowRankLinear(400, 100, rank=8, density=0.03)
    assert len(layer.values) == len(layer.support) == 1200
    assert not layer.B.any()
    for drawn in (layer.A.detach(), layer.values.detach()):
        assert 0.9 / 20 < drawn.abs().max() <= 1 / 20
        assert drawn.std() == pytest.approx(1 / 20 / 3**0.5, rel=0.1)
    louder = SparseLowRankLinear(400, 100, rank=8, density=0.03, init_gain=4.0)
    assert louder.values.std().item() == pytest.approx(4 / 20 / 3**0.5, rel=0.1)


@pytest.mark.parametrize(("elements", "count"), [(1000, 0), (1000, 1), (1000, 37), (1000, 600), (1000, 1000), (7, 4)])
def test_places_are_different_and_ascend(elements, count):
    found = places(elements, count, seed=3, name="layer")
    assert found.dtype == torch.int32
    assert len(found) == count
    assert (found[1:] > found[:-1]).all()
    assert count == 0 or (found[0] >= 0 and found[-1] < elements)


def test_places_are_a_function_of_seed_and_name():
    torch.manual_seed(1)
    one = places(10_000, 300, 0, "model.layers.0.mlp")
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(one, places(10_000, 300, 0, "model.layers.0.mlp"))
    assert not torch.equal(one, places(10_000, 300, 1, "model.layers.0.mlp"))
    assert not torch.equal(one, places(10_000, 300, 0, "model.layers.1.mlp"))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "nothing is taken from the global generator"


@pytest.mark.parametrize("count", [4, 12])
def test_every_place_is_as_likely(count):
    """Of 16, drawn 4000 times: each within five standard deviations of its share."""
    times = torch.zeros(16)
    for seed in range(4000):
        times[places(16, count, seed, "").long()] += 1
    share = count / 16
    spread = (4000 * share * (1 - share)) ** 0.5
    assert (times - 4000 * share).abs().max() < 5 * spread


def test_saved_places_are_kept():
    layer, other = (SparseLowRankLinear(30, 20, rank=2, seed=seed) for seed in (0, 1))
    assert not torch.equal(layer.support, other.support)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.support, other.support)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, "rank must be a whole number >= 1, got 0"),
        ({"rank": 2, "alpha": 0}, "alpha must be a number > 0, got 0"),
        ({"rank": 2, "density": 1.5}, r"density must be a number in \[0, 1\], got 1.5"),
        ({"rank": 2, "seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"rank": 2, "init_gain": float("nan")}, "init_gain must be a finite number, got nan"),
    ],
)
def test_bad_values(keys, message):
    with pytest.raises(ValueError, match=message):
        SparseLowRankLinear(8, 8, **keys)


def test_a_matrix_that_32_bits_cannot_count():
    with pytest.raises(ValueError, match="32-bit"):
        SparseLowRankLinear(2**16, 2**15, rank=2, device="meta")
