"""Fira: the authors' arithmetic, the limiter and the options."""

from functools import partial

import pytest
import torch
from fira import FiraAdamW as Reference
from torch import nn

from gracile import optim

# the authors' exact singular vectors; the default is one cheap iteration
FiraAdamW = partial(optim.FiraAdamW, subspace_method="svd")
GaLoreAdamW = partial(optim.GaLoreAdamW, subspace_method="svd")

SHAPES = [(40, 24), (24, 40), (32, 32)]
STEPS = 50
RANK = 6


def weight(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype))


def gradients(*shape, steps=STEPS, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(1 + t % 3) * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for t in range(steps)]


def moved(optimizer, parameter, G):
    before = parameter.detach().clone()
    parameter.grad = G.clone()
    optimizer.step()
    return before - parameter.detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
def test_given_gradients_lead_where_fira_leads(shape, proj_type):
    """50 steps, refreshes at 0, 20 and 40, decay, a plain vector beside the matrix; 1e-6 is asked, bits are met."""
    group = {"rank": RANK, "update_proj_gap": 20, "proj_type": proj_type, "weight_decay": 0.2}
    ours, theirs, b, c = weight(*shape), weight(*shape), weight(9, seed=2), weight(9, seed=2)
    one = FiraAdamW([{"params": [ours], "scale": 0.25, **group}, {"params": [b]}], lr=0.01)
    groups = [{"params": [theirs], "alpha": 0.25, **group}, {"params": [c]}]
    other = Reference(groups, lr=0.01, no_deprecation_warning=True)
    start = ours.detach().clone()
    for G, g in zip(gradients(*shape), gradients(9, seed=3), strict=True):
        ours.grad, theirs.grad, b.grad, c.grad = G.clone(), G.clone(), g.clone(), g.clone()
        one.step()
        other.step()
        assert (ours - theirs).abs().max() <= 1e-6
        assert (b - c).abs().max() <= 1e-6
    assert (ours - start).abs().max() > 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_the_residual_grows_by_at_most_its_bound_and_its_lines_have_adams_norms(shape):
    """The parts of an update outside and inside the subspace, told apart by projecting it."""
    W = weight(*shape, dtype=torch.float64)
    keys = {"rank": RANK, "scale": 0.5, "update_proj_gap": 10**6}
    optimizer = FiraAdamW([W], lr=1.0, residual="orthogonal", **keys)
    right = shape[0] >= shape[1]
    previous = None
    for t, G in enumerate(gradients(*shape, dtype=torch.float64)):
        U = moved(optimizer, W, G)
        P = optimizer.state[W]["basis"]
        correction = (1 - 0.999 ** (t + 1)) ** 0.5 / (1 - 0.9 ** (t + 1))
        outside = (U - U @ P @ P.t() if right else U - P @ P.t() @ U) / correction
        norm = outside.norm()
        torch.testing.assert_close(optimizer.state[W]["residual_norm"].double(), norm, rtol=1e-5, atol=1e-9)
        if previous is None:
            R = G @ P if right else P.t() @ G
            N = 0.1 * R / (0.001**0.5 * R.abs() + 1e-6)
            axis = 1 if right else 0
            E = G - G @ P @ P.t() if right else G - P @ P.t() @ G
            f = N.norm(dim=axis, keepdim=True) / (R.norm(dim=axis, keepdim=True) + 1e-8)
            torch.testing.assert_close(outside, f * E, rtol=1e-8, atol=1e-10)
        else:
            assert norm <= 1.01 * (previous + 1e-8) * (1 + 1e-6)
        previous = norm


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_an_orthogonal_residual_vanishes_and_galore_is_left(shape):
    one, other = weight(*shape, dtype=torch.float64), weight(*shape, dtype=torch.float64)
    keys = {"rank": min(shape), "scale": 0.5, "update_proj_gap": 20, "lr": 0.01}
    fira, galore = FiraAdamW([one], residual="orthogonal", **keys), GaLoreAdamW([other], **keys)
    for G in gradients(*shape, dtype=torch.float64):
        torch.testing.assert_close(moved(fira, one, G), moved(galore, other, G), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_transposing_the_matrix_transposes_the_run(shape):
    one, other = weight(*shape, dtype=torch.float64), nn.Parameter(weight(*shape, dtype=torch.float64).detach().t())
    keys = {"rank": RANK, "update_proj_gap": 10**6, "lr": 0.01}
    first, second = FiraAdamW([one], **keys), FiraAdamW([other], **keys)
    for G in gradients(*shape, dtype=torch.float64, steps=20):
        torch.testing.assert_close(moved(first, one, G), moved(second, other, G.t()).t(), rtol=0, atol=1e-10)


def test_a_zero_gradient_first_does_not_hold_the_residual_down_for_a_thousand_steps():
    W = weight(40, 24)
    optimizer = FiraAdamW([W], rank=RANK, lr=1.0)
    moved(optimizer, W, torch.zeros(40, 24))
    assert optimizer.state[W]["residual_norm"] == 0
    for G in gradients(40, 24, steps=2):
        moved(optimizer, W, G)
    assert optimizer.state[W]["residual_norm"] > 1


def test_limiting_after_the_bias_correction_lets_a_constant_gradient_through():
    """Corrected, the ratio of norms is constant; uncorrected it rises sixfold and the limiter throttles it."""
    (G,) = gradients(40, 24, steps=1)
    outside = {}
    for choice in (False, True):
        W = weight(40, 24)
        optimizer = FiraAdamW([W], rank=RANK, lr=1.0, residual="orthogonal", limit_after_bias_correction=choice)
        for _ in range(12):
            U = moved(optimizer, W, G)
        P = optimizer.state[W]["basis"]
        outside[choice] = (U - U @ P @ P.t()).norm()
    assert outside[False] < 0.7 * outside[True]


def test_bf16_keeps_fp32_moments_and_stays_finite():
    W = weight(40, 24, dtype=torch.bfloat16)
    optimizer = FiraAdamW([W], rank=RANK, lr=0.01)
    for G in gradients(40, 24, dtype=torch.bfloat16):
        moved(optimizer, W, G)
    state = optimizer.state[W]
    assert (W.dtype, state["exp_avg"].dtype, state["residual_norm"].dtype) == (torch.bfloat16, *[torch.float32] * 2)
    assert torch.isfinite(W).all()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"growth": 0.99}, ["growth", "0.99"]),
        ({"residual": "all"}, ["residual", "'all'", "orthogonal"]),
        ({"limit_after_bias_correction": 1}, ["limit_after_bias_correction", "1"]),
    ],
)
def test_bad_values_are_refused(keys, words):
    with pytest.raises(ValueError) as error:
        FiraAdamW([weight(4, 4)], rank=2, **keys)
    assert all(word in str(error.value) for word in words)
