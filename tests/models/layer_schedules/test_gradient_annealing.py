"""AutoSparse's training: a factor that fades to zero, and densities that are counted and kept from vanishing."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from gracile.models.convert import convert, merge
from gracile.models.layer_schedules.gradient_annealing import GradientAnnealing
from gracile.models.layers import ThresholdLinear


def model(**keys):
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Linear(50, 80), nn.Tanh(), nn.Linear(80, 30)), ThresholdLinear, ["0", "2"], **keys)


def test_the_factor_is_the_larger_of_a_sigmoid_and_a_cosine():
    """Values computed by hand from the formula."""
    annealing = GradientAnnealing(model(), annealing=0.5)
    shares = {0: 1.0, 25: 0.9526, 50: 0.5, 75: 0.1464, 89: 0.0295, 90: 0.0, 100: 0.0}
    for t, share in shares.items():
        assert annealing.factor(t, 100) == pytest.approx(0.5 * share, abs=1e-4)
    factors = [annealing.factor(t, 1000) for t in range(900)]
    assert all(a > b for a, b in pairwise(factors))


def test_with_a_cosine_it_falls_from_its_start_to_zero_and_depends_on_the_step_alone():
    annealing = GradientAnnealing(model(), annealing=0.6, annealed_share=0.8, schedule="cosine")
    factors = [annealing.factor(t, 100) for t in range(101)]
    assert factors[0] == 0.6
    assert factors[40] == pytest.approx(0.3)
    assert all(a > b for a, b in pairwise(factors[:81]))
    assert factors[80:] == [0.0] * 21
    assert GradientAnnealing(model(), 0.6, 0.8, schedule="cosine").factor(57, 100) == factors[57]


def test_every_layer_is_told_and_counts_on_time():
    net = model()
    annealing = GradientAnnealing(net, check_every=3)
    told = []
    for number in range(7):
        annealing.begin(number, 10)
        told.append(net[0].counts)
        assert net[0].annealed == net[2].annealed == torch.tensor(annealing.factor(number, 10))
    assert told == [True, False, False] * 2 + [True]


def test_densities_of_layers_add_up_to_that_of_all():
    net = model(s_init=-2.5)
    annealing = GradientAnnealing(net)
    annealing.begin(0, 10)
    net(torch.randn(4, 50))
    densities = annealing.densities()
    assert densities.keys() == {"0", "2", ""}
    dense = {name: net.get_submodule(name).dense() for name in ("0", "2")}
    for name, W in dense.items():
        assert densities[name] == (W != 0).sum().item() / W.numel()
    assert 0 < densities["0"] < 1
    assert densities[""] == pytest.approx((4000 * densities["0"] + 2400 * densities["2"]) / 6400)
    plain = merge(net)
    assert torch.equal(plain[0].weight, dense["0"])
    assert type(plain[0]) is nn.Linear


def test_thresholds_that_run_away_leave_the_least_density():
    net = model(s_init=2.0)
    annealing = GradientAnnealing(net, min_density=0.05, check_every=1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.5)
    for number in range(20):
        annealing.begin(number, 20)
        net(torch.randn(8, 50)).square().mean().backward()
        assert min(annealing.densities().values()) >= 0.05
        optimizer.step()
        optimizer.zero_grad()
    free = GradientAnnealing(model(s_init=2.0), min_density=0.0)
    free.begin(0, 20)
    free.layers["0"](torch.randn(8, 50))
    assert free.densities()["0"] == 0


def test_a_budget_is_its_density():
    annealing = GradientAnnealing(model(sparsity=0.75))
    assert annealing.densities() == {"0": 0.25, "2": 0.25, "": 0.25}


def test_it_learns_a_sparse_target():
    """The threshold rises by itself, and the loss stays."""
    torch.manual_seed(0)
    target = torch.randn(20, 30) * (torch.rand(20, 30) < 0.2)
    net = nn.Sequential(ThresholdLinear(30, 20, s_init=-3.0))
    annealing = GradientAnnealing(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.02)
    for number in range(400):
        annealing.begin(number, 400)
        x = torch.randn(64, 30)
        loss = (net(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert annealing.densities()[""] < 0.5
    assert loss < 0.1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"annealing": 1.5}, r"annealing must be a number in \[0, 1\], got 1.5"),
        ({"annealed_share": 0}, r"annealed_share must be a number in \(0, 1\], got 0"),
        ({"min_density": -1}, r"min_density must be a number in \[0, 1\], got -1"),
        ({"check_every": 0}, "check_every must be a whole number >= 1, got 0"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        GradientAnnealing(model(), **keys)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="model must have ThresholdLinear layers, got 'Linear'"):
        GradientAnnealing(nn.Linear(2, 3))
