"""SRSTEAdamW: AdamW on the gradient and the pull of what is pruned, which no accumulation or loss scale multiplies."""

import pytest
import torch
from torch import nn

from gracile.models.convert import convert
from gracile.models.layers import NMLinear
from gracile.nm_pattern import largest
from gracile.optim import SRSTEAdamW, param_groups, state_bytes

SHAPES = {"tall": (40, 24), "wide": (8, 96), "square": (48, 48), "row": (1, 24)}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def weight(shape, seed=0, dtype=torch.float64):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(shape, steps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(steps)]


def follow(optimizer, W, sequence):
    for G in sequence:
        W.grad = G.clone()
        optimizer.step()
    return W.detach()


@by_shape
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (1, 3)])
def test_it_is_adamw_on_the_gradient_of_the_loss_and_the_pull(shape, n, m):
    """lam / 2 |(1 - P) W|^2, differentiated by autograd where P is held."""
    W, X = weight(shape), weight(shape)
    ours = SRSTEAdamW([W], lr=0.02, weight_decay=0.1, n=n, m=m, sr_lambda=0.3)
    theirs = torch.optim.AdamW([X], lr=0.02, weight_decay=0.1)
    for G in gradients(shape, 30):
        W.grad = G.clone()
        ours.step()
        pruned = ~largest(X, n, m)
        (pull,) = torch.autograd.grad(0.3 / 2 * (pruned * X).square().sum(), X)
        X.grad = G + pull
        theirs.step()
    torch.testing.assert_close(W, X, rtol=1e-10, atol=1e-12)


def test_the_pull_is_the_derivative_by_finite_differences():
    """Told from the first moment after one step without a gradient."""
    W = weight((4, 8))
    optimizer = SRSTEAdamW([W], lr=0.0, n=1, m=4, sr_lambda=0.3)
    W.grad = torch.zeros_like(W)
    optimizer._is_blank = lambda work: False  # a step without a learning rate and a gradient would not count
    optimizer.step()
    found = optimizer.state[W]["exp_avg"] / 0.1
    pruned = ~largest(W, 1, 4)

    def loss(values):
        return 0.3 / 2 * (pruned * values).square().sum()

    for place in range(W.numel()):
        shift = torch.zeros(W.numel(), dtype=torch.float64)
        shift[place] = 1e-5
        shift = shift.view(W.shape)
        slope = (loss(W.detach() + shift) - loss(W.detach() - shift)) / 2e-5
        assert found.view(-1)[place] == pytest.approx(slope.item(), abs=1e-9)


@by_shape
def test_decoupled_it_shrinks_what_is_pruned_beside_the_moments(shape):
    W, X = weight(shape), weight(shape)
    ours = SRSTEAdamW([W], lr=0.02, weight_decay=0.1, sr_lambda=0.3, decoupled=True)
    theirs = torch.optim.AdamW([X], lr=0.02, weight_decay=0.1)
    for G in gradients(shape, 20):
        W.grad, X.grad = G.clone(), G.clone()
        pull = 0.3 * X.detach() * ~largest(X, 2, 4)
        ours.step()
        theirs.step()
        with torch.no_grad():
            X.sub_(pull, alpha=0.02)
    torch.testing.assert_close(W, X, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decoupled", [True, False])
def test_without_gradients_what_is_kept_stays(decoupled):
    W = weight((8, 16))
    before, kept = W.detach().clone(), largest(W, 2, 4)
    optimizer = SRSTEAdamW([W], lr=0.01, sr_lambda=0.5, decoupled=decoupled)
    follow(optimizer, W, [torch.zeros(8, 16, dtype=torch.float64)] * 5)
    assert torch.equal(W[kept], before[kept])
    assert W[~kept].norm() < before[~kept].norm()
    if decoupled:
        torch.testing.assert_close(W[~kept], before[~kept] * (1 - 0.01 * 0.5) ** 5)


@pytest.mark.parametrize("keys", [{"sr_lambda": 0.0}, {"n": None}, {"n": 4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_pull_it_is_torch_adamw(keys, dtype):
    W, X = weight((40, 24), dtype=dtype), weight((40, 24), dtype=dtype)
    sequence = gradients((40, 24), 20, dtype)
    follow(SRSTEAdamW([W], lr=0.02, weight_decay=0.1, **keys), W, sequence)
    follow(torch.optim.AdamW([X], lr=0.02, weight_decay=0.1), X, sequence)
    torch.testing.assert_close(W, X, rtol=1e-5, atol=1e-6)


def model(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    return convert(net, NMLinear, ["0", "2"])


def loss_of(net, t, rows=slice(None)):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(t))[rows]
    return (net(x) - x[:, :8].sin()).square().mean()


def groups(net, **keys):
    return param_groups(net, target_modules=r"\d", n=2, m=4, **keys)


def test_neither_accumulation_nor_a_loss_scale_multiplies_the_pull():
    whole, parts, scaled = (model().double() for _ in "abc")
    nets = {net: SRSTEAdamW(groups(net), lr=0.01, sr_lambda=0.2) for net in (whole, parts, scaled)}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x = torch.randn(32, 16, dtype=torch.float64)
    for _ in range(5):
        for net in nets:
            net.zero_grad()
        (whole(x) - x[:, :8].sin()).square().mean().backward()
        for part in x.chunk(4):
            ((parts(part) - part[:, :8].sin()).square().mean() / 4).backward()
        scaler.scale((scaled(x) - x[:, :8].sin()).square().mean()).backward()
        nets[whole].step()
        nets[parts].step()
        scaler.step(nets[scaled])
        scaler.update()
    for other in (parts, scaled):
        for p, q in zip(whole.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def test_masks_settle():
    """The paper's point: with the pull fewer masks change."""
    changes = {}
    for lam in (0.0, 0.2):
        net = model()
        optimizer = SRSTEAdamW(groups(net), lr=0.01, sr_lambda=lam)
        changes[lam] = 0
        for t in range(60):
            before = largest(net[0].weight, 2, 4)
            optimizer.zero_grad()
            loss_of(net, t).backward()
            optimizer.step()
            changes[lam] += (largest(net[0].weight, 2, 4) ^ before).sum().item() if t >= 20 else 0
    assert changes[0.2] < 0.5 * changes[0.0]


def test_groups_are_of_matrices_and_the_rest_is_plain():
    net = model()
    held = groups(net, weight_decay=0.1)
    assert [(g.get("n"), len(g["params"]), g["weight_decay"]) for g in held] == [(2, 2, 0.1), (None, 2, 0.0)]
    optimizer = SRSTEAdamW(held)
    loss_of(net, 0).backward()
    optimizer.step()
    assert state_bytes(optimizer) == 8 * sum(p.numel() for p in net.parameters()) + 4 * 4


def test_bf16_weights_have_wide_moments_and_move_as_wide_ones_nearly():
    W, X = weight((40, 24), dtype=torch.bfloat16), weight((40, 24), dtype=torch.bfloat16)
    X = nn.Parameter(X.detach().float())
    sequence = gradients((40, 24), 10, torch.bfloat16)
    optimizer = SRSTEAdamW([W], lr=0.05, sr_lambda=0.2)
    follow(optimizer, W, sequence)
    follow(SRSTEAdamW([X], lr=0.05, sr_lambda=0.2), X, [G.float() for G in sequence])
    assert optimizer.state[W]["exp_avg"].dtype == torch.float32
    near = (W.float() - X).abs() < 0.05  # but where a mask fell otherwise among equals
    assert near.float().mean() > 0.99


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n": 0}, "n must be a whole number from 1 to m=4, got 0"),
        ({"m": 300}, "m must be a whole number from 2 to 256, got 300"),
        ({"sr_lambda": -1}, "sr_lambda must be a number >= 0, got -1"),
        ({"decoupled": 1}, "decoupled must be True or False, got 1"),
        ({"m": 5}, r"n=2 needs matrices with rows that m=5 divides, got a parameter of shape \(40, 24\); put it into"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SRSTEAdamW([weight((40, 24))], **keys)


@pytest.mark.parametrize("shape", [(8,), (2, 4, 6), (2, 3, 4, 4)])
def test_what_is_no_matrix_is_refused_also_with_a_name(shape):
    for params in ([weight(shape)], [("name", weight(shape))]):
        with pytest.raises(ValueError, match="n=2 needs matrices with rows that m=4 divides, got a parameter of shape"):
            SRSTEAdamW(params)
    SRSTEAdamW([weight(shape)], n=None)
