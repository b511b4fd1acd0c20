"""Maestro's training: every width has its turn, the penalty is the layers', and layers shrink on time."""

from collections import Counter

import pytest
import torch
from torch import nn

from gracile.models.convert import convert
from gracile.models.layer_schedules.ordered_dropout import OrderedDropout
from gracile.models.layers import OrderedLowRankLinear


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return convert(net, OrderedLowRankLinear, ["0", "2"])


def widths(net):
    return net[0].sampled, net[2].sampled


def test_each_pair_of_a_layer_and_a_width_has_one_turn():
    net = model()
    dropout = OrderedDropout(net, seed=3)
    pairs = [(first, None) for first in range(1, 6)] + [(None, second) for second in range(1, 4)]
    orders = []
    for turn in range(3):
        drawn = []
        for place in range(8):
            dropout.draw(8 * turn + place)
            drawn.append(widths(net))
        assert Counter(drawn) == Counter(pairs)
        orders.append(drawn)
    assert orders[0] != orders[1] != orders[2]
    again = OrderedDropout(net, seed=3)
    again.draw(11)
    assert widths(net) == orders[1][3], "a function of the seed and the number alone"


def test_columns_beyond_the_width_get_no_gradient_and_early_ones_the_most():
    net = model()
    dropout = OrderedDropout(net)
    seen = torch.zeros(5)
    for number in range(8):
        dropout.draw(number)
        net.zero_grad()
        net(torch.randn(4, 5)).square().sum().backward()
        width = net[0].sampled
        if width is not None:
            assert not net[0].U.grad[:, width:].any()
            assert not net[0].V.grad[:, width:].any()
            seen += net[0].U.grad.any(0)
    assert seen.tolist() == [5, 4, 3, 2, 1]


def test_each_layer_may_have_a_width_of_its_own_or_none():
    net = model()
    drawn = set()
    for number in range(60):
        OrderedDropout(net, sampler="each").draw(number)
        drawn.add(widths(net))
    assert {first for first, _ in drawn} == set(range(1, 6))
    assert {second for _, second in drawn} == set(range(1, 4))
    OrderedDropout(net, sampler="none").draw(0)
    assert widths(net) == (None, None)


def test_widths_are_for_training():
    net = model()
    x = torch.randn(4, 5)
    whole = net.eval()(x)
    OrderedDropout(net, sampler="each", seed=1).draw(4)
    assert torch.equal(net(x), whole)
    assert not torch.equal(net.train()(x), whole)


def test_the_penalty_is_the_layers():
    net = model()
    added = OrderedDropout(net, penalty=0.25).loss()
    assert added.item() == pytest.approx(0.25 * (net[0].penalty() + net[2].penalty()).item())
    added.backward()
    assert net[0].U.grad.any()


def test_layers_shrink_on_time():
    net = model()
    with torch.no_grad():
        net[0].U[:, 3:] = 0
    dropout = OrderedDropout(net, shrink_every=4, threshold=1e-3)
    for step in (1, 2, 3):
        dropout.shrink(step)
        assert net[0].width == 5
    dropout.shrink(4)
    assert (net[0].width, net[2].width) == (3, 3)
    for number in range(6):
        dropout.draw(number)
        assert (net[0].sampled or 0) <= 3
    idle = OrderedDropout(model())
    idle.shrink(4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sampler": "two"}, "sampler must be one of one, each, none, got 'two'"),
        ({"penalty": -1}, "penalty must be a number >= 0, got -1"),
        ({"shrink_every": 1.5}, "shrink_every must be a whole number >= 0, got 1.5"),
        ({"threshold": "a"}, "threshold must be a number >= 0, got 'a'"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        OrderedDropout(model(), **keys)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="model must have OrderedLowRankLinear layers, got 'Linear'"):
        OrderedDropout(nn.Linear(2, 3))
