"""Masks on their way from dense to n:m: phases, monotony, the last frame, and nothing but the step's number."""

import math

import pytest
import torch
from torch import nn

from gracile.models.layer_schedules.mask_decay import DECAYS, MaskDecay, patterns
from gracile.models.layers import NMLinear


def model(n=1, m=8, width=64):
    torch.manual_seed(0)
    return nn.Sequential(NMLinear(width, 16, n=n, m=m), nn.Tanh(), NMLinear(16, 4, n=2, m=4))


def seen(decay, steps=100, layer=0, net=None, **keys):
    """b and the pattern of a layer at each step, the one after the last included."""
    net = model() if net is None else net
    controller, told = MaskDecay(net, decay, **keys), []
    for step in range(steps + 1):
        controller.at(step, steps)
        told.append((net[layer].residue, net[layer].pattern))
    return told


@pytest.mark.parametrize("decay", ["linear", "exponential"])
def test_a_mask_fades_after_the_dense_steps_and_before_the_fine_tuning(decay):
    told = [residue for residue, pattern in seen(decay) if pattern == (1, 8)]
    assert told[:6] == [1.0] * 6
    assert 0 < told[79] < 0.03
    assert told[80:] == [0.0] * 21
    middle = torch.tensor(told[5:80])
    assert (middle.diff() < 0).all()
    if decay == "linear":
        torch.testing.assert_close(middle, 1 - torch.arange(75) / 75)
    else:
        torch.testing.assert_close(middle.log(), -math.log(1000) * torch.arange(75) / 75)


@pytest.mark.parametrize(
    ("decay", "frames"),
    [("sparsify", [(7, 8), (4, 8), (2, 8), (1, 8)]), ("fine", [(8, 64), (4, 32), (2, 16), (1, 8)])],
)
def test_patterns_have_equal_times_and_the_last_is_the_target(decay, frames):
    told = seen(decay, dense=0.1, fine_tune=0.1)
    assert [residue for residue, _ in told] == [1.0] * 10 + [0.0] * 91
    assert [pattern for _, pattern in told[10:]] == [frame for frame in frames for _ in range(20)] + [(1, 8)] * 11


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("n", "m"), [(1, 8), (2, 4), (3, 8), (1, 16), (2, 5), (4, 4)])
def test_never_more_weights_count_than_before(decay, n, m):
    """To the target, which the end is in any case; the mask of the layer has that many ones, each group its own."""
    net = model(n, m, width=m * 256)
    controller = MaskDecay(net, decay)
    layer, last = net[0], torch.inf
    for step in range(61):
        controller.at(step, 60)
        kept, group = layer.pattern
        assert (kept * m == n * group) or decay == "sparsify"
        density = kept / group + (1 - kept / group) * layer.residue
        assert density <= last + 1e-12
        last = density
    assert (layer.pattern, layer.residue, last) == ((n, m), 0.0, n / m)
    assert patterns(decay, n, m)[-1] == (n, m)


def test_layers_have_patterns_of_their_own():
    told = seen("fine", layer=2)
    assert [pattern for _, pattern in told if pattern == (8, 16)]
    assert {pattern for _, pattern in told} == {(8, 16), (4, 8), (2, 4)}


def test_it_is_a_function_of_the_step_alone():
    """A run that begins at step 37, on a model that has seen none of it."""
    for decay in DECAYS:
        net = model()
        MaskDecay(net, decay).at(37, 100)
        assert (net[0].residue, net[0].pattern) == seen(decay)[37]


def test_without_a_decay_or_steps_for_it_the_pattern_is_there():
    assert set(seen("none")) == {(0.0, (1, 8))}
    told = seen("linear", dense=0.3, fine_tune=0.7)
    assert told == [(1.0, (1, 8))] * 30 + [(0.0, (1, 8))] * 71
    assert seen("linear", dense=0.0, fine_tune=1.0)[0] == (0.0, (1, 8))
    assert seen("sparsify", steps=1)[1] == (0.0, (1, 8))


def test_frames_are_the_last_ones():
    told = {pattern for _, pattern in seen("fine", frames=2)}
    assert told == {(2, 16), (1, 8)}


def test_the_model_goes_from_the_dense_function_to_the_merged_one():
    net = model()
    x = torch.randn(5, 64)
    controller = MaskDecay(net)
    controller.at(0, 10)
    dense = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4))
    dense.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), dense(x))
    merged = nn.Sequential(net[0].merge(), nn.Tanh(), net[2].merge())
    gaps = []
    for step in range(11):
        controller.at(step, 10)
        gaps.append((net(x) - merged(x)).norm().item())
    assert gaps[0] > 0.1
    assert gaps[-1] < 1e-6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"decay": "linar"}, "decay must be one of linear, exponential, sparsify, fine, none, got 'linar'"),
        ({"dense": -0.1}, r"dense must be a number in \[0, 1\], got -0.1"),
        ({"fine_tune": "a"}, r"fine_tune must be a number in \[0, 1\], got 'a'"),
        ({"dense": 0.9}, "fine_tune and dense=0.9 must not exceed 1 together, got 0.2"),
        ({"frames": 0}, "frames must be a whole number >= 1 or None, got 0"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MaskDecay(model(), **keys)


def test_a_pattern_on_the_way_that_does_not_divide_a_layer_is_refused():
    with pytest.raises(ValueError, match="in_features must be a multiple of 64, where fine begins, or frames less"):
        MaskDecay(model(width=40), "fine")
    MaskDecay(model(width=48), "fine", frames=2)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="model must have NMLinear layers, got 'Linear'"):
        MaskDecay(nn.Linear(2, 3))
