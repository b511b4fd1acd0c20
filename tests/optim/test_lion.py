"""Lion on whole tensors and in GaLore's subspace."""

from functools import partial

import pytest
import torch
from lion_pytorch import Lion as Reference
from torch import nn

from gracile import optim
from gracile.optim import Lion, state_bytes

# the authors' exact singular vectors; the default is one cheap iteration
GaLoreLion = partial(optim.GaLoreLion, subspace_method="svd")

STEPS = 50
SHAPES = [(40, 24), (24, 40), (32, 32)]


def weight(*shape, seed=0, dtype=torch.float32):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(*shape, steps=STEPS, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(steps)]


def follow(optimizer, parameter, sequence):
    trajectory = []
    for G in sequence:
        parameter.grad = G.clone()
        optimizer.step()
        trajectory.append(parameter.detach().clone())
    return torch.stack(trajectory)


@pytest.mark.parametrize("shape", [*SHAPES, (7,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_stays_on_the_bits_of_lion_pytorch(shape, dtype):
    ours, theirs = weight(*shape, dtype=dtype), weight(*shape, dtype=dtype)
    keys = {"lr": 1e-3, "betas": (0.95, 0.98), "weight_decay": 0.3}
    got = follow(Lion([ours], **keys), ours, gradients(*shape, dtype=dtype))
    assert torch.equal(got, follow(Reference([theirs], **keys), theirs, gradients(*shape, dtype=dtype)))


def test_every_entry_moves_by_the_learning_rate_or_not_at_all():
    W, (G,) = weight(5, 6, dtype=torch.float64), gradients(5, 6, steps=1, dtype=torch.float64)
    G[0] = 0.0
    before = W.detach().clone()
    (after,) = follow(Lion([W], lr=1e-3, weight_decay=0.1), W, [G])
    torch.testing.assert_close(after, before * (1 - 1e-4) - 1e-3 * torch.sign(G), rtol=0, atol=1e-15)


def test_scaling_all_gradients_by_a_power_of_two_changes_no_bit():
    one, other = weight(9, 5), weight(9, 5)
    sequence = gradients(9, 5)
    assert torch.equal(follow(Lion([one]), one, sequence), follow(Lion([other]), other, [8 * G for G in sequence]))


@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_subspace_it_is_lion_on_the_coordinates(shape):
    """Dense loop in fp64 with a refresh at 0, 20 and 40, moments kept; the side is the shorter one."""
    m, n = shape
    W, sequence = weight(*shape, dtype=torch.float64), gradients(*shape, dtype=torch.float64)
    X, M = W.detach().clone(), 0.0
    keys = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.2}
    got = follow(GaLoreLion([W], rank=6, scale=0.5, update_proj_gap=20, **keys), W, sequence)
    for t, G in enumerate(sequence):
        if t % 20 == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        R = G @ Vh[:6].t() if m >= n else U[:, :6].t() @ G
        N = torch.sign(0.9 * M + 0.1 * R)
        M = 0.99 * M + 0.01 * R
        X = X * (1 - 1e-2 * 0.2) - 1e-2 * 0.5 * (N @ Vh[:6] if m >= n else U[:, :6] @ N)
        torch.testing.assert_close(got[t], X, rtol=0, atol=1e-12)


def test_a_group_without_a_rank_is_plain_lion():
    one, other = weight(9, 5), weight(9, 5)
    keys = {"lr": 1e-3, "weight_decay": 0.1}
    sequence = gradients(9, 5)
    assert torch.equal(follow(GaLoreLion([one], **keys), one, sequence), follow(Lion([other], **keys), other, sequence))


def test_state_is_one_moment_fp32_by_default():
    W, V = weight(40, 24, dtype=torch.bfloat16), weight(40, 24, dtype=torch.bfloat16)
    whole, low = Lion([W]), GaLoreLion([V], rank=6)
    for optimizer, p in ((whole, W), (low, V)):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert state_bytes(whole) == 4 * 40 * 24 + 4
    assert state_bytes(low) == 4 * 40 * 6 + 2 * 24 * 6 + 4, "the moment in fp32, the basis in the parameter's dtype"


@pytest.mark.parametrize(
    ("keys", "words"),
    [({"lr": -1}, ["lr", "-1"]), ({"betas": (0.9, 1.0)}, ["betas", "1.0"]), ({"weight_decay": -1}, ["weight_decay"])],
)
@pytest.mark.parametrize("cls", [Lion, GaLoreLion])
def test_bad_values_are_refused(cls, keys, words):
    with pytest.raises(ValueError) as error:
        cls([weight(3, 3)], **keys)
    assert all(word in str(error.value) for word in words)


def test_lion_knows_no_rank():
    with pytest.raises(ValueError, match="unknown parameter group key 'rank'"):
        Lion([{"params": [weight(3, 3)], "rank": 2}])
