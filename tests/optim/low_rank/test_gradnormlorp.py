"""GradNormLoRP: exact gradients of lengths and directions, the dense loop, rows on their spheres, decay, bf16."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from gracile import optim
from gracile.optim import state_bytes

# the authors' exact singular vectors; the default is one cheap iteration
GaLoreAdamW = partial(optim.GaLoreAdamW, subspace_method="svd")
GradNormLoRPAdamW = partial(optim.GradNormLoRPAdamW, subspace_method="svd")

SHAPES = [(40, 24), (24, 40), (32, 32)]
RANK = 6
STEPS = 50

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide", "square"])


def weight(*shape, seed=0, dtype=torch.float32):
    """Rows of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return nn.Parameter((values * torch.logspace(-2, 0, shape[0], dtype=torch.float64).unsqueeze(1)).to(dtype))


def gradients(*shape, steps=STEPS, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(1 + t % 3) * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for t in range(steps)]


def step(optimizer, parameter, G):
    parameter.grad = G.clone()
    optimizer.step()
    return parameter.detach().clone()


def lengths_of(W):
    return W.detach().double().norm(dim=1, keepdim=True)


def directions_of(W):
    return W.detach().double() / lengths_of(W)


def by_autograd(W, G):
    """Gradients of <G, W> at W = g c / |c| in fp64: dg and, for unit c, D."""
    g = lengths_of(W).requires_grad_()
    c = directions_of(W).requires_grad_()
    (G.double() * g * c / c.norm(dim=1, keepdim=True)).sum().backward()
    return g.grad, c.grad


def dense_loop(weight, given, bases, *, rank, gap, right, scale, lr, betas, eps, decay):
    """The docstring in fp64, W after every step; ``bases`` (one a refresh) give signs to singular vectors, no more."""
    g = lengths_of(weight)
    c, history, lengths_history = directions_of(weight), [], []
    for t, G in enumerate(given, start=1):
        G = G.double()
        dg = (G * c).sum(dim=1, keepdim=True)
        D = g * (G - dg * c)
        if (t - 1) % gap == 0:
            U, _, Vh = torch.linalg.svd(D, full_matrices=False)
            P = Vh[:rank].t() if right else U[:, :rank]
            turns = (P * bases[(t - 1) // gap].double()).sum(dim=0)
            assert (turns.abs() > 0.999).all()
            P = P * turns.sign()
        history.append(D @ P if right else P.t() @ D)
        lengths_history.append(dg)
        N, N_g = (adam_direction(h, betas, eps) for h in (history, lengths_history))
        c = c - lr * scale * (N @ P.t() if right else P @ N)
        c = c / c.norm(dim=1, keepdim=True)
        g = (g - lr * N_g) * (1 - lr * decay)  # decay after the step, as in GaLore's code
        yield g * c


def adam_direction(history, betas, eps):
    t = len(history)
    M = sum((1 - betas[0]) * betas[0] ** (t - 1 - s) * R for s, R in enumerate(history))
    V = sum((1 - betas[1]) * betas[1] ** (t - 1 - s) * R**2 for s, R in enumerate(history))
    return M / (V.sqrt() + eps) * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)


def against_the_dense_loop(shape, proj_type, dtype):
    """The largest distance over 50 steps with refreshes at 0, 20 and 40."""
    W = weight(*shape, dtype=dtype)
    start, given = W.detach().clone(), gradients(*shape, dtype=dtype)
    keys = {"rank": RANK, "scale": 0.5, "lr": 0.01, "betas": (0.8, 0.97), "eps": 1e-3}
    optimizer = GradNormLoRPAdamW([W], proj_type=proj_type, update_proj_gap=20, weight_decay=0.5, **keys)
    got = [step(optimizer, W, G) for G in given[:1]]
    bases = [optimizer.state[W]["basis"].clone()]
    for t, G in enumerate(given[1:], start=1):
        got.append(step(optimizer, W, G))
        if t % 20 == 0:
            bases.append(optimizer.state[W]["basis"].clone())
    right = shape[0] >= shape[1] if proj_type == "std" else proj_type == "right"
    wanted = list(dense_loop(start, given, bases, gap=20, right=right, decay=0.5, **keys))
    assert (wanted[-1] - start).abs().max() > 0.1
    return max((a - b).abs().max().item() for a, b in zip(got, wanted, strict=True))


# ---- gradients ------------------------------------------------------------------------------------------------------


@by_shape
def test_gradients_are_those_of_autograd_and_directions_move_along_their_spheres(shape):
    """Without a first beta the moments are the gradients; at full rank, lifting gives D back."""
    W = weight(*shape)
    optimizer = GradNormLoRPAdamW([W], rank=min(shape), betas=(0.0, 0.999), update_proj_gap=2, lr=0.01)
    for G in gradients(*shape, steps=5):
        before = W.detach().clone()
        dg, expected = by_autograd(before, G)
        step(optimizer, W, G)
        state = optimizer.state[W]
        P, R = state["basis"].double(), state["exp_avg"].double()
        D = R @ P.t() if shape[0] >= shape[1] else P @ R
        torch.testing.assert_close(state["length_exp_avg"].double(), dg, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(D, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        cosines = (D * before).sum(dim=1) / (lengths_of(before).squeeze() * G.norm(dim=1))
        assert cosines.abs().max() < 2e-5


@by_shape
def test_the_first_step_at_full_rank_is_projected_adam_on_the_gradients_of_weight_norm(shape):
    m, n = shape
    W = weight(m, n)
    layer = nn.Linear(n, m, bias=False, dtype=torch.float64)
    layer.weight.data = W.detach().double()
    weight_norm(layer, dim=0)
    lengths, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    with torch.no_grad():
        v.div_(v.norm(dim=1, keepdim=True))
    (x,), (y,) = gradients(64, n, steps=1, seed=2), gradients(64, m, steps=1, seed=3)
    (layer(x.double()) - y).square().mean().backward()
    W.grad = torch.autograd.grad((x @ W.t() - y).square().mean(), W)[0]
    before = W.detach().clone()
    keys = {"betas": (0.9, 0.999), "eps": 0.01}
    optimizer = GradNormLoRPAdamW([W], rank=min(m, n), scale=0.5, lr=0.01, **keys)
    optimizer.step()
    P = optimizer.state[W]["basis"].double()
    N = adam_direction([v.grad @ P if m >= n else P.t() @ v.grad], **keys)
    c = v - 0.005 * (N @ P.t() if m >= n else P @ N)
    expected = (lengths - 0.01 * adam_direction([lengths.grad], **keys)) * c / c.norm(dim=1, keepdim=True)
    torch.testing.assert_close(W.detach().double(), expected.detach(), rtol=0, atol=1e-6)
    assert (W - before).abs().max() > 0.005


# ---- the whole loop -------------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
def test_fifty_steps_follow_the_dense_loop(shape, proj_type):
    assert against_the_dense_loop(shape, proj_type, torch.float32) < 1e-4


def test_fp64_weights_follow_the_dense_loop_in_fp64():
    assert against_the_dense_loop((40, 24), "std", torch.float64) < 1e-12


@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (10, 6)])
def test_rows_columns_and_ranks_above_the_short_side(shape):
    """The rank is capped; a row of one number has no direction to change, only a length."""
    W = weight(*shape)
    capped = nn.Parameter(W.detach().clone())
    one, other = GradNormLoRPAdamW([W], rank=100, lr=0.01), GradNormLoRPAdamW([capped], rank=min(shape), lr=0.01)
    signs = W.detach().sign()
    for G in gradients(*shape, steps=8):
        assert torch.equal(step(one, W, G), step(other, capped, G))
    assert torch.isfinite(W).all()
    assert one.state[W]["basis"].shape[1] == min(shape)
    if shape[1] == 1:
        torch.testing.assert_close(W.detach(), one.state[W]["length"] * signs, rtol=1e-6, atol=0)


@by_shape
@pytest.mark.parametrize("method", ["svd", "iterate"])
def test_rows_have_their_lengths_after_every_step(shape, method):
    """Also lengths that pass through zero: the row turns round and its norm is |length|."""
    W = weight(*shape)
    optimizer = GradNormLoRPAdamW([W], rank=RANK, lr=0.05, update_proj_gap=5, subspace_method=method)
    torch.testing.assert_close(lengths_of(W), weight(*shape, dtype=torch.float64).norm(dim=1, keepdim=True).detach())
    for G in gradients(*shape, steps=20):
        step(optimizer, W, G)
        length = optimizer.state[W]["length"].double()
        torch.testing.assert_close(lengths_of(W), length.abs(), rtol=1e-6, atol=1e-8)
    assert (length < 0).any()
    assert (length > 0).any()


def test_a_length_is_learnt_past_zero_and_its_row_turns_round():
    W = weight(4, 12)
    start, c = lengths_of(W), directions_of(W)
    optimizer = GradNormLoRPAdamW([W], rank=2, lr=0.01, scale=0.0, eps=1e-12)
    for _ in range(20):
        step(optimizer, W, c.float())  # pulls every length down by lr
    torch.testing.assert_close(optimizer.state[W]["length"].double(), start - 0.2, rtol=0, atol=1e-5)
    torch.testing.assert_close(W.detach().double(), (start - 0.2) * c, rtol=0, atol=1e-5)
    assert start[0] < 0.1


@by_shape
def test_without_a_scale_lengths_change_and_rows_stay_parallel(shape):
    W = weight(*shape)
    c, start = directions_of(W), lengths_of(W)
    optimizer = GradNormLoRPAdamW([W], rank=RANK, scale=0.0, lr=1e-3, update_proj_gap=5)
    for G in gradients(*shape, steps=12):
        step(optimizer, W, G)
        turned = optimizer.state[W]["length"].sign()
        torch.testing.assert_close(directions_of(W) * turned, c, rtol=0, atol=1e-6)
    assert ((lengths_of(W) - start).abs() > 1e-4).float().mean() > 0.9


def test_the_subspace_is_that_of_the_tangential_gradient():
    """A radial part that outweighs everything else in G changes no basis."""
    W, V = weight(40, 24), weight(40, 24)
    (G,) = gradients(40, 24, steps=1)
    one, other = GradNormLoRPAdamW([W], rank=RANK), GradNormLoRPAdamW([V], rank=RANK)
    step(one, W, G)
    step(other, V, G + 50 * directions_of(weight(40, 24)).float())
    P, Q = one.state[W]["basis"], other.state[V]["basis"]
    assert (P @ P.t() - Q @ Q.t()).abs().max() < 1e-3


# ---- rows of zeros, decay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_rows_of_zeros_stay_zero_and_the_others_do_not_notice(proj_type):
    W = weight(12, 8)
    with torch.no_grad():
        W[[0, 5]] = 0
    some = [i for i in range(12) if i not in (0, 5)]
    alone = nn.Parameter(W.detach()[some].clone())
    keys = {"rank": 4, "lr": 0.01, "weight_decay": 0.1, "update_proj_gap": 10**6, "proj_type": proj_type}
    one, other = GradNormLoRPAdamW([W], **keys), GradNormLoRPAdamW([alone], **keys)
    for G in gradients(12, 8, steps=10):
        step(one, W, G)
        step(other, alone, G[some])
        assert not W[[0, 5]].any()
        torch.testing.assert_close(W[some], alone, rtol=0, atol=1e-5)
    assert all(torch.isfinite(value).all() for value in one.state[W].values())
    assert not one.state[W]["length"][[0, 5]].any()
    whole = GradNormLoRPAdamW([Z := nn.Parameter(torch.zeros(12, 8))], **keys)
    assert not step(whole, Z, G).any()


@by_shape
def test_decay_acts_on_lengths_alone(shape):
    """One step decays what an undecayed step leaves; with gradients of zero only the lengths shrink."""
    W, V = weight(*shape), weight(*shape)
    decayed, free = (GradNormLoRPAdamW([p], rank=RANK, lr=0.1, weight_decay=d) for p, d in ((W, 0.5), (V, 0.0)))
    (G,) = gradients(*shape, steps=1)
    step(decayed, W, G)
    step(free, V, G)
    torch.testing.assert_close(W.detach(), 0.95 * V.detach(), rtol=1e-6, atol=1e-7)
    Z = weight(*shape)
    start, c = lengths_of(Z), directions_of(Z)
    optimizer = GradNormLoRPAdamW([Z], rank=RANK, lr=0.1, weight_decay=0.5)
    for _ in range(10):
        step(optimizer, Z, torch.zeros(*shape))
    torch.testing.assert_close(lengths_of(Z), start * 0.95**10, rtol=1e-5, atol=0)
    torch.testing.assert_close(directions_of(Z), c, rtol=0, atol=1e-6)


# ---- dtypes, saving, state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_bf16_stays_finite_and_keeps_lengths_that_bf16_could_not(shape):
    W = weight(*shape, dtype=torch.bfloat16)
    optimizer = GradNormLoRPAdamW([W], rank=RANK, lr=1e-4, update_proj_gap=20, eps=1e-12)
    start = lengths_of(W)
    for _ in range(STEPS):
        step(optimizer, W, directions_of(W).bfloat16())  # every length falls by lr a step, a bf16 rounding of 1 is 4e-3
    state = optimizer.state[W]
    assert {state[key].dtype for key in ("length", "length_exp_avg", "length_exp_avg_sq")} == {torch.float32}
    assert (W.dtype, state["basis"].dtype, state["exp_avg"].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(start - state["length"].double(), torch.full_like(start, 0.005), rtol=1e-2, atol=0)
    for G in gradients(*shape, dtype=torch.bfloat16):
        step(optimizer, W, G)
        torch.testing.assert_close(lengths_of(W), state["length"].double().abs(), rtol=4e-3, atol=0)
    assert torch.isfinite(W).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_continues_to_the_bit_across_a_refresh(dtype, tmp_path):
    W = weight(40, 24, dtype=dtype)
    keys = {"rank": RANK, "update_proj_gap": 5, "weight_decay": 0.1, "lr": 0.01}
    one = GradNormLoRPAdamW([W], **keys)
    given = gradients(40, 24, steps=17, dtype=dtype)
    for G in given[:8]:
        step(one, W, G)
    torch.save(one.state_dict(), tmp_path / "optimizer.pt")
    other = GradNormLoRPAdamW([V := nn.Parameter(W.detach().clone())], **keys)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for G in given[8:]:
        assert torch.equal(step(one, W, G), step(other, V, G))
        assert all(torch.equal(value, other.state[V][key]) for key, value in one.state[W].items())


def test_parameters_without_a_rank_get_plain_adamw():
    matrix, vector = weight(10, 6), weight(6, 1)
    twins = copy.deepcopy([matrix, vector])
    keys = {"lr": 0.01, "weight_decay": 0.1}
    one, other = GradNormLoRPAdamW([matrix, vector], **keys), GaLoreAdamW(twins, **keys)
    for pair in zip(gradients(10, 6, steps=5), gradients(6, 1, steps=5), strict=True):
        for p, q, G in zip((matrix, vector), twins, pair, strict=True):
            p.grad, q.grad = G.clone(), G.clone()
        one.step()
        other.step()
    assert torch.equal(matrix, twins[0])
    assert torch.equal(vector, twins[1])


@by_shape
def test_state_is_galores_and_three_numbers_a_row(shape):
    sizes = []
    for kind in (GradNormLoRPAdamW, GaLoreAdamW):
        optimizer = kind([W := weight(*shape)], rank=RANK)
        step(optimizer, W, torch.ones(*shape))
        sizes.append(state_bytes(optimizer))
    assert sizes[0] - sizes[1] == 4 * 3 * shape[0]
