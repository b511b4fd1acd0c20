"""CastAdamS: the paper's loop in fp64, what L1 may touch, exact n:m at the end, and no matrix without a mask."""

import io

import pytest
import torch
from torch import nn

from gracile.models.convert import convert, merge
from gracile.models.layers import ScaledLinear
from gracile.nm_pattern import largest
from gracile.optim import CastAdamS, full_state, load_full_state, param_groups, state_bytes
from gracile.optim.state.spec import to_portable
from tests.oracle.cast import adams, mask_of

SHAPES = {"tall": (20, 12), "wide": (3, 48), "square": (12, 12), "row": (1, 24)}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def weight(shape, seed=0, dtype=torch.float64):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def noise(shape, steps, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(steps)]


def follow(optimizer, W, sequence):
    trajectory = []
    for G in sequence:
        W.grad = G.clone()
        optimizer.step()
        trajectory.append(W.detach().clone())
    return trajectory


def bits_of(optimizer, W):
    """The mask in force."""
    (group,) = optimizer.param_groups
    ((_, shard, state),) = optimizer.shards_of(W, group)
    return to_portable(optimizer.specs(shard, group), shard, state)["mask"].bool()


@by_shape
@pytest.mark.parametrize(("n", "m", "every"), [(2, 4, 4), (1, 3, 1), (1, 12, 7)])
def test_it_is_the_papers_loop(shape, n, m, every):
    """Against the dense loop, with gradients that depend on W, a falling learning rate, and to the finalised end."""
    T, target = 24, weight(shape, seed=5).detach()
    W = weight(shape)
    shakes = noise(shape, T)
    lrs = [0.05 * (1 - t / (T + 1)) for t in range(T)]
    keys = {"n": n, "m": m, "lam": 0.3, "mask_every": every}
    expected, masks, final = adams(W.detach(), [lambda X, E=E: X - target + 0.3 * E for E in shakes], lrs, **keys)
    optimizer = CastAdamS([W], total_steps=T, **keys)
    for t, E in enumerate(shakes):
        optimizer.param_groups[0]["lr"] = lrs[t]
        W.grad = W.detach() - target + 0.3 * E
        optimizer.step()
        assert torch.equal(bits_of(optimizer, W), masks[t].bool())
        torch.testing.assert_close(W.detach(), final if t == T - 1 else expected[t], rtol=1e-9, atol=1e-11)
    assert ((W != 0).unflatten(1, (-1, m)).sum(2) == n).all()


def test_the_first_step_is_adam_with_the_square_of_the_moment_and_has_its_mask():
    """a = 0: no entry is pulled, whatever lam is; but the mask is there."""
    W, X = weight((8, 12)), weight((8, 12))
    (G,) = noise((8, 12), 1)
    one, other = CastAdamS([W], lr=0.01, total_steps=9, lam=1e6), CastAdamS([X], lr=0.01, total_steps=9, n=4)
    before = W.detach().clone()
    follow(one, W, [G])
    follow(other, X, [G])
    assert torch.equal(W, X)
    mu = 0.1 * G
    torch.testing.assert_close(W.detach(), before - 0.01 * (mu / 0.1) / (mu.abs() + 1e-8), rtol=1e-9, atol=0)
    assert torch.equal(bits_of(one, W), mask_of(before, 2, 4).bool())


def test_what_masks_keep_never_sees_the_pull():
    W, X = weight((8, 12)), weight((8, 12))
    sequence = noise((8, 12), 9)
    pulled = follow(CastAdamS([W], lr=0.01, total_steps=30, lam=5.0, mask_every=100), W, sequence)
    free = follow(CastAdamS([X], lr=0.01, total_steps=30, lam=0.0, mask_every=100), X, sequence)
    kept = largest(weight((8, 12)), 2, 4)
    for one, other in zip(pulled[1:], free[1:], strict=True):
        assert torch.equal(one[kept], other[kept])
        assert (one[~kept] != other[~kept]).all()


def test_masks_are_found_at_the_top_of_every_tenth_step_and_not_between():
    W = weight((8, 16))
    optimizer = CastAdamS([W], lr=0.05, total_steps=100)
    held = []
    for G in noise((8, 16), 25):
        before = largest(W, 2, 4)
        follow(optimizer, W, [G])
        held.append((bits_of(optimizer, W), before))
    for t, (mask, of_step) in enumerate(held):
        assert torch.equal(mask, held[t // 10 * 10][1])
        assert torch.equal(mask, of_step) or t % 10
    assert not torch.equal(held[9][0], held[10][0])


def test_a_quadratic_drives_what_is_pruned_below_the_last_learning_rate():
    """And what is kept to the target. At a constant rate what is pruned goes on swinging by it."""
    torch.manual_seed(0)
    target = 0.3 * torch.randn(16, 32, dtype=torch.float64)
    start = target + 0.01 * torch.randn(16, 32, dtype=torch.float64)
    left = {}
    for falling in (True, False):
        W = nn.Parameter(start.clone())
        optimizer = CastAdamS([W], total_steps=401, lam=1.0)
        for t in range(400):
            optimizer.param_groups[0]["lr"] = 1e-4 + 0.02 * (1 - t / 400) * falling + 0.01 * (not falling)
            W.grad = W.detach() - target
            optimizer.step()
        mask = bits_of(optimizer, W)
        assert torch.equal(mask, largest(W, 2, 4))
        left[falling] = W.detach()[~mask].abs().max()
        torch.testing.assert_close(W.detach()[mask], target[mask], rtol=0, atol=0.02)
    assert left[True] < 5e-4 < 2e-3 < left[False]


# ---- with its layers ------------------------------------------------------------------------------------------------


def model(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8), nn.LayerNorm(8))
    return convert(net, ScaledLinear, ["0", "2"])


def cast(net, steps=20, **keys):
    groups = param_groups(net, target_modules=r"\d", n=2, m=4)
    return CastAdamS(groups, lr=0.01, total_steps=steps, mask_every=3, **keys)


def train(net, optimizer, steps):
    for t in steps:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        (net(x) - x[:, :8].sin()).square().mean().backward()
        optimizer.step()


def test_after_the_last_step_weights_are_sparse_and_folded_they_compute_the_same():
    net = model()
    optimizer = cast(net)
    train(net, optimizer, range(19))
    assert (net[0].weight != 0).all()
    train(net, optimizer, range(19, 20))
    x = torch.randn(5, 16)
    y = net(x)
    assert (net[0].A - 1).abs().max() > 0.01, "it trains"
    effective = (net[0].weight.unflatten(1, (2, -1)) * net[0].A[:, :, None]).flatten(1)
    merged = merge(net)
    assert torch.equal(merged[0].weight, effective)
    torch.testing.assert_close(merged(x), y)
    for layer in (merged[0], merged[2]):
        assert type(layer) is nn.Linear
        assert ((layer.weight != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()


def test_scales_and_norms_get_plain_adam():
    net, other = model(), model()
    optimizer = cast(net)
    plain = torch.optim.Adam([p for p in other.parameters() if p.dim() == 1 or p.shape[1] == 2], lr=0.01)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        if not name.endswith("weight") or name.startswith("3"):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [1, 3, 8])
def test_a_run_goes_on_to_the_bit_between_masks_too(at):
    net = model()
    optimizer = cast(net)
    train(net, optimizer, range(at))
    saved = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    resumed, again = (other := model(1)), cast(other)
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    train(net, optimizer, range(at, 20))
    train(resumed, again, range(at, 20))
    for one, other in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_masks_travel_whole():
    """Of a matrix whose entries do not fill their last byte."""
    W, X = weight((5, 12)), weight((5, 12), seed=9)
    one, other = (CastAdamS([p], lr=0.02, total_steps=30, n=1, m=3, mask_every=5) for p in (W, X))
    sequence = noise((5, 12), 12)
    follow(one, W, sequence[:7])
    follow(other, X, sequence[:1])
    load_full_state(other, full_state(one))
    assert torch.equal(bits_of(one, W), bits_of(other, X))
    with torch.no_grad():
        X.copy_(W)
    assert torch.equal(follow(one, W, sequence[7:])[-1], follow(other, X, sequence[7:])[-1])


def test_state_is_two_moments_and_a_bit_an_entry_in_fp32_also_of_bf16():
    W = weight((10, 12), dtype=torch.bfloat16)
    optimizer = CastAdamS([W], total_steps=3, n=1, m=3)
    follow(optimizer, W, noise((10, 12), 1, dtype=torch.bfloat16))
    assert {k: (v.dtype, v.numel()) for k, v in optimizer.state[W].items()} == {
        "step": (torch.float32, 1),
        "exp_avg": (torch.float32, 120),
        "exp_avg_sq": (torch.float32, 120),
        "mask_bits": (torch.uint8, 15),
    }
    assert state_bytes(optimizer) == 4 + 8 * 120 + 15


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "total_steps must be a whole number >= 1, got None"),
        ({"total_steps": 0}, "total_steps must be a whole number >= 1, got 0"),
        ({"total_steps": 9, "lam": -1}, "lam must be a number >= 0, got -1"),
        ({"total_steps": 9, "mask_every": 0}, "mask_every must be a whole number >= 1, got 0"),
        ({"total_steps": 9, "n": 5}, "n must be a whole number from 1 to m=4, got 5"),
        (
            {"total_steps": 9, "m": 5},
            r"n=2 needs matrices with rows that m=5 divides, got a parameter of shape \(8",
        ),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        CastAdamS([weight((8, 12))], **keys)


def test_a_matrix_that_would_have_no_mask_is_refused():
    net = model()
    with pytest.raises(ValueError, match=r"matrices with rows that m=4 divides, got a parameter of shape \(24,\)"):
        CastAdamS(net.parameters(), total_steps=9)
    with pytest.raises(ValueError, match=r"the weight of ScaledLinear\(.*\) needs a mask, got n=None; put it into a"):
        CastAdamS(net.parameters(), n=None)


def test_a_group_may_have_what_the_defaults_lack():
    net = model()
    CastAdamS(param_groups(net, target_modules=r"\d", n=2, m=4, total_steps=100))
    with pytest.raises(ValueError, match="total_steps must be a whole number >= 1, got None"):
        CastAdamS(param_groups(net, target_modules=r"\d", n=2, m=4))
