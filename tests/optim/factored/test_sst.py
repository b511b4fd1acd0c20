"""SSTAdamW: the paper's loop in fp64, what holds after every step, and runs that go on."""

import copy
import io

import pytest
import torch
from torch import nn

from gracile.models.convert import convert
from gracile.models.layers import SpectralLinear
from gracile.optim import SSTAdamW, param_groups, state_bytes
from gracile.rng import generator_of
from tests.oracle.sst import Sst

by_shape = pytest.mark.parametrize(("m", "n", "rank"), [(14, 9, 3), (7, 20, 6), (8, 8, 8)])


def layer_of(m, n, rank, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return SpectralLinear(n, m, rank=rank, bias=False, dtype=dtype)


def columns(layer, name):
    frozen = getattr(layer, f"{name}_frozen")
    active = getattr(layer, name).detach()
    return active if frozen is None else torch.cat([active, frozen.detach()], 1)


def model(seed=0, rank=3, dtype=torch.float32):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9), nn.LayerNorm(9)).to(dtype)
    return convert(net, SpectralLinear, ["0", "2"], rank=rank)


def train(net, optimizer, steps, dtype=torch.float32):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 12, generator=generator).to(dtype)
        loss = (net(x) - x[:, :9].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@by_shape
@pytest.mark.parametrize(
    ("every", "iterations", "warmup", "reset"),
    [(4, 2, 3, False), (3, 1, 0, False), (5, None, 2, False), (4, 3, 2, True)],
)
def test_it_is_the_papers_loop(m, n, rank, every, iterations, warmup, reset):
    layer = layer_of(m, n, rank)
    with torch.no_grad():
        layer.sigma.add_(1)  # of none that is clamped to zero can the vectors be foretold
    keys = {"swap_every": every, "lr": 0.02, "reset_sigma": reset}
    optimizer = SSTAdamW(layer.parameters(), iterations=iterations, warmup_steps=warmup, seed=5, **keys)
    rounds = iterations or -(-min(m, n) // rank)
    oracle = Sst(columns(layer, "U"), layer.sigma.detach(), columns(layer, "V"), rank, iterations=rounds,
                 warmup=warmup or 1, **keys)  # fmt: skip
    target = torch.randn(m, n, dtype=torch.float64)

    def draw(p, t):
        return torch.multinomial(p.float(), rank, generator=generator_of(5, "SST", 0, t))

    for _ in range(23):
        D = oracle.weight() - target
        x = torch.eye(n, dtype=torch.float64)
        loss = (layer(x) - target.T).square().sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        oracle.step(D, draw)
        torch.testing.assert_close(layer.dense(), oracle.weight(), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(layer.sigma.detach(), oracle.held["sigma"], rtol=1e-8, atol=1e-9)
    assert (layer.dense() - target).norm() < (layer_of(m, n, rank).dense() - target).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_every_step_columns_have_length_one_and_sigma_is_not_negative(dtype):
    net = model(dtype=dtype)
    parameters = list(net.parameters())
    optimizer = SSTAdamW(param_groups(net), lr=0.3, swap_every=3, iterations=2)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    for step in range(10):
        train(net, optimizer, [step], dtype)
        for layer in (net[0], net[2]):
            assert (layer.sigma >= 0).all()
            for name in ("U", "V"):
                lengths = torch.linalg.vector_norm(columns(layer, name).float(), dim=0)
                assert (lengths - 1).abs().max() < tolerance
    assert (net[0].sigma == 0).any() or (net[2].sigma == 0).any(), "the clamp was never needed"
    assert all(one is other for one, other in zip(parameters, net.parameters(), strict=True))


def test_draws_and_decompositions_leave_the_weights():
    net = model(dtype=torch.float64)
    optimizer = SSTAdamW(param_groups(net), lr=0.05, swap_every=4, iterations=2)
    for step in range(8):
        still = step in (3, 7)  # nothing else moves when pairs are drawn
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if still else 0.05
        before, active = net[0].dense(), net[0].U.detach().clone()
        train(net, optimizer, [step], torch.float64)
        if still:
            torch.testing.assert_close(net[0].dense(), before, rtol=1e-10, atol=1e-10)
            assert not torch.equal(net[0].U, active)
            U = columns(net[0], "U")
            apart = (U.T @ U - torch.eye(U.shape[1], dtype=torch.float64)).abs().max()
            assert (apart < 1e-10) == (step == 7), "orthogonal after a decomposition alone"


def test_decay_is_for_sigma_alone():
    layer = layer_of(8, 8, 4, torch.float32)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = SSTAdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    (0 * sum(p.sum() for p in layer.parameters())).backward()
    optimizer.step()
    torch.testing.assert_close(layer.sigma.detach(), 0.95 * before["sigma"])
    for name in ("U", "V"):
        torch.testing.assert_close(getattr(layer, name).detach(), before[name], rtol=1e-6, atol=1e-7)


def test_what_is_drawn_follows_its_probabilities():
    drawn = torch.zeros(6)
    count = 400
    for seed in range(count):
        layer = layer_of(6, 6, 1, torch.float32)
        with torch.no_grad():
            layer.sigma.copy_(torch.tensor([50.0, 1, 1, 1, 1, 1]))
        optimizer = SSTAdamW(layer.parameters(), lr=0.0, swap_every=1, iterations=2, seed=seed)
        marks = layer.U.detach().clone(), columns(layer, "U")
        layer(torch.randn(2, 6)).sum().backward()
        optimizer.step()
        drawn += torch.isclose(marks[1], layer.U.detach(), atol=1e-5).all(0)
    p = layer_of(6, 6, 1).probabilities({"sigma": torch.tensor([50.0, 1, 1, 1, 1, 1])})
    deviations = (drawn - count * p) / (count * p * (1 - p)).sqrt()
    assert drawn.sum() == count
    assert deviations.abs().max() < 4
    assert (drawn[1:] > 0).all(), "small ones have their turn"


@pytest.mark.parametrize("at", [2, 4, 5, 9])
def test_a_run_goes_on_to_the_bit(at):
    def begun(seed):
        net = model(seed)
        return net, SSTAdamW(param_groups(net), lr=0.05, swap_every=2, iterations=2, warmup_steps=2)

    net, optimizer = begun(0)
    train(net, optimizer, range(at))
    saved = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(net, optimizer, range(at, 12))
    resumed, again = begun(1)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    train(resumed, again, range(at, 12))
    for (name, one), other in zip(net.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_copies_and_pickles_are_found():
    net = model()
    for other in (copy.deepcopy(net), torch.load(_pickled(net), weights_only=False)):
        optimizer = SSTAdamW(other.parameters(), swap_every=1)
        before = other[0].U.detach().clone()
        train(other, optimizer, range(1))
        assert not torch.equal(other[0].U, before)
    optimizer = SSTAdamW(net.parameters(), swap_every=1, lr=0.01)
    train(net, optimizer, range(3))
    both = torch.load(_pickled([optimizer, net]), weights_only=False)
    train(net, optimizer, range(3, 5))
    train(both[1], both[0], range(3, 5))
    for one, other in zip(net.parameters(), both[1].parameters(), strict=True):
        assert torch.equal(one, other)


def _pickled(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def test_a_weight_that_is_not_finite_is_kept_without_a_crash():
    net = model()
    optimizer = SSTAdamW(net.parameters(), swap_every=1, iterations=1)
    with torch.no_grad():
        net[0].sigma.fill_(torch.nan)
    train(net, optimizer, range(2))
    assert torch.isnan(net[0].sigma).any()


def test_state_is_of_the_active_vectors_and_all_singular_values():
    net = model(rank=3)
    optimizer = SSTAdamW(net.parameters())
    train(net, optimizer, range(1))
    trained = [p for p in net.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    assert count == 3 * (12 + 20) + 12 + 20 + 3 * (20 + 9) + 9 + 9 + 2 * 9
    assert state_bytes(optimizer) == 8 * count + 4 * len(trained)
    assert SSTAdamW.state_bytes_for((20, 3)) == 8 * 60 + 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"swap_every": 0}, "swap_every must be a whole number >= 1, got 0"),
        ({"swap_every": 2.5}, "swap_every must be a whole number >= 1, got 2.5"),
        ({"iterations": 0}, "iterations must be a whole number >= 1 or None, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number >= 0, got -1"),
        ({"seed": "a"}, "seed must be a whole number >= 0, got 'a'"),
        ({"synchronize": 1}, "synchronize must be True or False, got 1"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(") + "$"):
        SSTAdamW(model().parameters(), **keys)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="SSTAdamW found no SpectralLinear by the parameters it was given"):
        SSTAdamW(nn.Linear(3, 4).parameters())


def test_parts_of_a_layer_that_are_not_stepped_together_are_refused():
    net = model()
    net[0].sigma.requires_grad_(False)
    optimizer = SSTAdamW(net.parameters())
    with pytest.raises(RuntimeError, match="must step U, V, sigma of a SpectralLinear together, but sigma of"):
        train(net, optimizer, range(1))
