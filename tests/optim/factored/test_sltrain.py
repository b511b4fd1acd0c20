"""SLTrainAdamW: torch's AdamW on the factors and values of SLTrain's layers, and the same in 8 bits."""

import pytest
import torch
from torch import nn

from gracile.models.convert import convert
from gracile.models.layers import SparseLowRankLinear
from gracile.optim import SLTrainAdamW, SLTrainAdamW8bit, param_groups, state_bytes


def model(wide=24, rank=4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(wide, wide + 7), nn.Tanh(), nn.Linear(wide + 7, wide, bias=False))
    return convert(net, SparseLowRankLinear, ["0", "2"], rank=rank, density=0.1)


def train(net, optimizer, steps=10):
    for step in range(steps):
        x = torch.randn(16, net[0].in_features, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - x.sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_torch_adamw(decay):
    one, other = model(), model()
    train(one, SLTrainAdamW(one.parameters(), lr=0.01, weight_decay=decay))
    train(other, torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=decay))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_in_8_bits_it_is_bitsandbytes():
    import bitsandbytes

    losses = {}
    for name, kind in (("ours", SLTrainAdamW8bit), ("theirs", bitsandbytes.optim.AdamW8bit), ("fp32", SLTrainAdamW)):
        net = model(wide=96, rank=48)
        losses[name] = train(net, kind(net.parameters(), lr=0.01, weight_decay=0.0), 30)
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-2)
    assert losses["ours"] == pytest.approx(losses["fp32"], rel=2e-2)


def test_state_is_of_the_factors_and_values():
    net = model(wide=96, rank=48)
    q = int(0.1 * 96 * 103)
    held = {}
    for kind in (SLTrainAdamW, SLTrainAdamW8bit):
        optimizer = kind(param_groups(net))
        train(net, optimizer, 1)
        held[kind] = state_bytes(optimizer)
    trained = 2 * (48 * (96 + 103) + q) + 103
    assert sum(p.numel() for p in net.parameters()) == trained
    assert held[SLTrainAdamW] == 8 * trained + 7 * 4
    small = 103 + 2 * q  # of fewer than 4096 elements
    blocks = 2 * (48 * 96 // 256) + 2 * -(-48 * 103 // 256)
    assert held[SLTrainAdamW8bit] == 2 * (trained - small) + 8 * small + 8 * blocks + 7 * 4


def test_factors_and_values_are_one_group_and_biases_another():
    net = model()
    factors, biases = param_groups(net, weight_decay=0.1)
    assert {id(p) for p in biases["params"]} == {id(net[0].bias)}
    assert {id(p) for p in factors["params"]} == {id(p) for p in net.parameters()} - {id(net[0].bias)}


@pytest.mark.parametrize("kind", [SLTrainAdamW, SLTrainAdamW8bit])
def test_a_model_without_layers_is_refused(kind):
    message = f"{kind.__name__} found no SparseLowRankLinear by the parameters it was given; put such layers into the"
    with pytest.raises(ValueError, match=message):
        kind(nn.Linear(3, 4).parameters())
