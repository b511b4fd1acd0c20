"""ReLoRAAdamW: LoRA between merges, more than its rank after them, and moments that start again."""

import io

import pytest
import torch
from torch import nn

from gracile.models.convert import convert
from gracile.models.layers import ReLoRALinear
from gracile.optim import ReLoRAAdamW, param_groups, state_bytes


def model(seed=0, rank=2, dtype=torch.float32):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9), nn.LayerNorm(9)).to(dtype)
    return convert(net, ReLoRALinear, ["0", "2"], rank=rank, alpha=4.0, seed=3)


def train(net, optimizer, steps, dtype=torch.float32):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 12, generator=generator).to(dtype)
        loss = (net(x) - x[:, :9].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def states(optimizer, net):
    """For A and B of the first layer."""
    return {name: optimizer.state[getattr(net[0], name)] for name in ("A", "B")}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_between_merges_it_is_torch_adamw(decay):
    one, other = model(), model()
    ours = ReLoRAAdamW([p for p in one.parameters() if p.requires_grad], lr=0.02, weight_decay=decay)
    theirs = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.02, weight_decay=decay)
    train(one, ours, range(8))
    train(other, theirs, range(8))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_each_cycle_is_adamw_begun_anew():
    """Two runs of torch's AdamW, the second from the folded model with fresh moments, are one of ReLoRA's."""
    net, other = model(dtype=torch.float64), model(dtype=torch.float64)
    train(net, ReLoRAAdamW(net[:3].parameters(), lr=0.02, merge_every=5), range(12), torch.float64)
    biases = [other[0].bias, other[2].bias]  # no factors of a layer: their moments stay
    kept = {}
    for begin in (0, 5, 10):
        fresh = torch.optim.AdamW([p for p in other[:3].parameters() if p.requires_grad], lr=0.02, weight_decay=0)
        fresh.state.update(kept)
        train(other, fresh, range(begin, min(begin + 5, 12)), torch.float64)
        kept = {p: fresh.state[p] for p in biases}
        if begin < 10:
            for layer in (other[0], other[2]):
                layer.fold()
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10, msg=name)


def test_a_merge_leaves_the_function_and_the_sum_is_of_higher_rank():
    net = model(rank=2, dtype=torch.float64)
    first = net[0].weight.detach().clone()
    optimizer = ReLoRAAdamW(net.parameters(), lr=0.05, merge_every=6)
    ranks, x = [], torch.randn(7, 12, dtype=torch.float64)
    for cycle in range(3):
        train(net, optimizer, range(6 * cycle, 6 * cycle + 5), torch.float64)
        optimizer.param_groups[0]["lr"] = 0.0
        before = net(x)
        train(net, optimizer, [6 * cycle + 5], torch.float64)
        torch.testing.assert_close(net(x), before, rtol=1e-9, atol=1e-10)
        optimizer.param_groups[0]["lr"] = 0.05
        assert not net[0].B.any()
        assert net[0].A.all()
        ranks.append(int(torch.linalg.matrix_rank(net[0].weight - first, rtol=1e-8)))
    assert ranks == [2, 4, 6]


def test_a_reset_leaves_nothing_of_the_factors_moments_and_all_of_others():
    net = model()
    optimizer = ReLoRAAdamW(net.parameters(), merge_every=4)
    train(net, optimizer, range(3))
    assert all(state[key].any() for state in states(optimizer, net).values() for key in ("exp_avg", "exp_avg_sq"))
    train(net, optimizer, [3])
    assert not any(state[key].any() for state in states(optimizer, net).values() for key in ("exp_avg", "exp_avg_sq"))
    assert all(optimizer.state[p]["exp_avg"].any() for p in (net[0].bias, net[3].weight))


@pytest.mark.parametrize("reset", ["random", "magnitude"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.999, 1.0])
def test_a_part_of_the_moments_is_reset_to_the_exact_count(reset, ratio):
    net = model()
    optimizer = ReLoRAAdamW(net.parameters(), merge_every=100, reset_every=4, reset=reset, reset_ratio=ratio)
    train(net, optimizer, range(3))
    twin = model()
    again = ReLoRAAdamW(twin.parameters(), merge_every=100, reset_every=50)
    train(twin, again, range(4))
    train(net, optimizer, [3])
    for name, state in states(optimizer, net).items():
        first = states(again, twin)[name]["exp_avg"]
        gone = (state["exp_avg"] == 0) & (first != 0)
        assert int(gone.sum()) == int(ratio * first.numel() + 1e-9)
        for key in ("exp_avg", "exp_avg_sq"):
            before = states(again, twin)[name][key]
            assert not state[key][gone].any()
            assert torch.equal(state[key][~gone], before[~gone])
        if reset == "magnitude" and 0 < gone.sum() < gone.numel():
            assert first[gone].abs().max() <= first[~gone].abs().min()


def test_steps_are_counted_from_the_reset_unless_told_otherwise():
    """After a reset Adam's first update is as large as the learning rate; without the reset of the count, larger."""
    moved = {}
    for reset_step in (True, False):
        net = model()
        optimizer = ReLoRAAdamW(net.parameters(), lr=0.01, reset_step=reset_step)
        train(net, optimizer, range(3))
        for state in optimizer.state.values():
            state["step"].fill_(4999)
        train(net, optimizer, [3, 4])  # a merge, and a step from B = 0
        moved[reset_step] = net[0].B.detach().abs().max().item()
    assert moved[True] == pytest.approx(0.01, rel=1e-3)
    assert moved[False] == pytest.approx(0.0317, rel=1e-2)


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_run_goes_on_to_the_bit(at):
    def begun(seed):
        net = model(seed)
        return net, ReLoRAAdamW(param_groups(net), lr=0.05, merge_every=3, reset="random", reset_ratio=0.5)

    net, optimizer = begun(0)
    train(net, optimizer, range(at))
    saved = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(net, optimizer, range(at, 10))
    resumed, again = begun(1)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    train(resumed, again, range(at, 10))
    for (name, one), other in zip(net.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_state_is_of_the_factors_alone():
    net = model(rank=2)
    optimizer = ReLoRAAdamW(net.parameters())
    train(net, optimizer, range(1))
    trained = [p for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * (12 + 20) + 20 + 2 * (20 + 9) + 9 + 2 * 9
    assert state_bytes(optimizer) == 8 * sum(p.numel() for p in trained) + 4 * len(trained)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge_every": 0}, "merge_every must be a whole number >= 1, got 0"),
        ({"reset_every": 1.5}, "reset_every must be a whole number >= 1 or None, got 1.5"),
        ({"reset": "all"}, "reset must be one of zero, random, magnitude, got 'all'"),
        ({"reset_ratio": 1.1}, "reset_ratio must be a number in .0, 1., got 1.1"),
        ({"reset_step": 0}, "reset_step must be True or False, got 0"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ReLoRAAdamW(model().parameters(), **keys)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="ReLoRAAdamW found no ReLoRALinear by the parameters it was given; put such"):
        ReLoRAAdamW(nn.Linear(3, 4).parameters())
