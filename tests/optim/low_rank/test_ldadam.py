"""LDAdam: nothing is lost, moments are carried into each new subspace, and the error outlives what is done to grads."""

import pytest
import torch
from torch import nn

from gracile.optim import LDAdamW

SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (16, 16)}
RANK = 4
KEYS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 0.05, "weight_decay": 0.3}

by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_feedback = pytest.mark.parametrize("feedback", [True, False], ids=["feedback", "no-feedback"])


# ---- helpers --------------------------------------------------------------------------------------------------------


def weight(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype))


def gradients(*shape, steps=30, seed=1, dtype=torch.float32):
    """Noise around a slow walk, of sizes between 0.5 and 1.5: the subspace turns, but not at random."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    sizes = 1 + 0.5 * torch.cos(torch.arange(steps, dtype=torch.float64)).view(-1, *[1] * len(shape))
    return [G.to(dtype) for G in sizes * (noise + noise.cumsum(dim=0) / 2)]


def is_right(shape, proj_type="std"):
    m, n = shape
    return {"std": m >= n, "reverse_std": m < n, "left": False, "right": True}[proj_type]


def step(optimizer, W, G):
    """One step; the state after it, which later steps do not change."""
    W.grad = G.clone()
    optimizer.step()
    return {key: value.clone() for key, value in optimizer.state[W].items()}


def wide(tensor, right):
    """The projected side first."""
    return tensor.T if right else tensor


def momentum(state, right):
    """X = P M, as short x long."""
    return state["basis"] @ wide(state["exp_avg"], right)


def dense(W, sequence, *, rank, right, rho, feedback, lr, betas, eps, weight_decay):
    """Weight, error, projector and second moment after every step: fp64, the projected side first, B formed.

    None of them depends on the signs that an SVD happens to return.
    """
    W, (b1, b2) = wide(W.detach().double(), right), betas
    E = torch.zeros_like(W)
    for t, G in enumerate(sequence):
        A = wide(G.double(), right) + (E if feedback else 0)
        if t == 0:
            P = torch.linalg.svd(A, full_matrices=False)[0][:, :rank]
            M = V = torch.zeros(P.shape[1], A.shape[1], dtype=torch.float64)
            E = A - P @ P.T @ A
        else:
            previous, m, v = P, M / (1 - b1**t), V / (1 - b2**t)
            B = rho * previous @ m + (1 - rho) * A
            Q, upper = torch.linalg.qr(B @ B.T @ previous)
            P = Q @ torch.diag(torch.sign(torch.diagonal(upper)))
            C = P.T @ previous
            E = A - P @ P.T @ A + b1 / (1 - b1) * (previous @ M - P @ C @ M)
            V = (1 - b2**t) * ((C * C) @ (v - m * m) + (C @ m) ** 2).abs()
            M = C @ M
        R = P.T @ A
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R * R
        N = (M / (1 - b1 ** (t + 1))) / ((V / (1 - b2 ** (t + 1))).sqrt() + eps)
        W = (1 - lr * weight_decay) * W - lr * P @ N
        yield wide(W, right), wide(E, right), P @ P.T, wide(V, right)


# ---- the method -----------------------------------------------------------------------------------------------------


@by_shape
@by_feedback
@pytest.mark.parametrize(("rank", "rho"), [(RANK, 0.908), (RANK, 0.3), (1, 0.908), (100, 0.908)])
def test_a_run_follows_a_dense_loop_in_fp64(shape, feedback, rank, rho):
    """30 steps with decay, an eps that shows where it is added, ranks from one to all."""
    W, right = weight(*shape, dtype=torch.float64), is_right(shape)
    sequence, start = gradients(*shape, dtype=torch.float64), W.detach().clone()
    optimizer = LDAdamW([W], rank=rank, rho=rho, error_feedback=feedback, **KEYS)
    wanted = dense(W, sequence, rank=rank, right=right, rho=rho, feedback=feedback, **KEYS)
    for G, (weights, error, projector, second) in zip(sequence, wanted, strict=True):
        state = step(optimizer, W, G)
        torch.testing.assert_close(W.detach(), weights, rtol=0, atol=1e-9)
        torch.testing.assert_close(state["basis"] @ state["basis"].T, projector, rtol=0, atol=1e-8)
        assert ("error" in state) == feedback
        if feedback:
            torch.testing.assert_close(state["error"], error, rtol=0, atol=1e-7)
        torch.testing.assert_close(state["exp_avg_sq"], second, rtol=0, atol=1e-7)
    assert (W - start).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("proj_type", ["reverse_std", "left", "right"])
def test_the_side_can_be_chosen(shape, proj_type):
    W, right = weight(*shape, dtype=torch.float64), is_right(shape, proj_type)
    sequence = gradients(*shape, dtype=torch.float64)
    optimizer = LDAdamW([W], rank=RANK, proj_type=proj_type, **KEYS)
    wanted = dense(W, sequence, rank=RANK, right=right, rho=0.908, feedback=True, **KEYS)
    for G, (weights, error, *_) in zip(sequence, wanted, strict=True):
        torch.testing.assert_close(step(optimizer, W, G)["error"], error, rtol=0, atol=1e-7)
        torch.testing.assert_close(W.detach(), weights, rtol=0, atol=1e-9)


@by_shape
@pytest.mark.parametrize("betas", [(0.908, 0.99), (0.5, 0.9), (0.0, 0.9)])
def test_nothing_is_lost(shape, betas):
    """X_t + (1 - b1) E_t+1 = b1 X_t-1 + (1 - b1) (G_t + E_t), with X = P M, over 60 steps."""
    W, right, b1 = weight(*shape, dtype=torch.float64), is_right(shape), betas[0]
    optimizer = LDAdamW([W], rank=RANK, betas=betas)
    X, E = torch.zeros(min(shape), max(shape), dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    largest = 0.0
    for G in gradients(*shape, steps=60, dtype=torch.float64):
        state = step(optimizer, W, G)
        before = b1 * X + (1 - b1) * wide(G + E, right)
        X, E = momentum(state, right), state["error"]
        after = X + (1 - b1) * wide(E, right)
        assert (after - before).abs().max() <= 1e-13 * before.abs().max()
        largest = max(largest, (E.norm() / G.norm()).item())
    assert largest > 0.5


@by_shape
def test_at_full_rank_there_is_no_error_and_the_momentum_is_that_of_the_whole_gradient(shape):
    W, right = weight(*shape, dtype=torch.float64), is_right(shape)
    optimizer = LDAdamW([W], rank=min(shape), betas=(0.9, 0.95))
    average = torch.zeros(min(shape), max(shape), dtype=torch.float64)
    for G in gradients(*shape, dtype=torch.float64):
        state = step(optimizer, W, G)
        average = 0.9 * average + 0.1 * wide(G, right)
        assert state["error"].abs().max() <= 1e-12
        torch.testing.assert_close(momentum(state, right), average, rtol=0, atol=1e-12)


@by_shape
@pytest.mark.parametrize("full", [False, True])
def test_where_the_subspace_stays_the_moments_are_adams_in_rotated_coordinates(shape, full):
    """Gradients of fixed singular vectors, their values in one order. What the subspace misses adds up in the error."""
    short, long = min(shape), max(shape)
    rank, right = short if full else RANK, is_right(shape)
    generator = torch.Generator().manual_seed(6)
    U = torch.linalg.qr(torch.randn(short, short, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(long, short, generator=generator, dtype=torch.float64))[0]
    W = weight(*shape, dtype=torch.float64)
    rotated = nn.Parameter(U.T @ wide(W.detach(), right))
    ours = LDAdamW([W], rank=rank, **KEYS)
    other = torch.optim.AdamW([rotated], **KEYS)
    places, missed, previous = torch.arange(short, dtype=torch.float64), 0.0, None
    for t in range(20):
        inside = (U * torch.where(places < rank, (1 + t % 3) * (2 - places / short), 0.0)) @ V.T
        outside = (U * torch.where(places < rank, 0.0, 0.01 * torch.cos(places + t))) @ V.T
        missed = missed + outside
        state = step(ours, W, wide(inside + outside, right))
        P = state["basis"]
        if previous is not None:  # the same columns with the same signs
            torch.testing.assert_close(P, previous, rtol=0, atol=1e-8)
        previous, turn = P, U[:, :rank].T @ P
        torch.testing.assert_close(turn.abs(), torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-8)
        rotated.grad = (U.T @ inside).contiguous()
        other.step()
        told = other.state[rotated]
        M, S = turn @ wide(state["exp_avg"], right), wide(state["exp_avg_sq"], right)
        torch.testing.assert_close(state["error"], wide(missed, right), rtol=0, atol=1e-8)
        torch.testing.assert_close(M, told["exp_avg"][:rank], rtol=0, atol=1e-8)
        torch.testing.assert_close(S, told["exp_avg_sq"][:rank], rtol=0, atol=1e-8)
        torch.testing.assert_close(wide(W.detach(), right), U @ rotated.detach(), rtol=0, atol=1e-7)


@by_shape
def test_the_basis_is_orthonormal_after_every_step(shape):
    """In fp32, also where a gradient has one direction or none."""
    W = weight(*shape)
    optimizer = LDAdamW([W], rank=RANK, error_feedback=False)
    sequence = gradients(*shape)
    thin = [torch.zeros(shape), sequence[0][:, :1] @ sequence[1][:1], torch.zeros(shape)]
    for G in [*thin, *sequence, *thin, *sequence[:3]]:
        P = step(optimizer, W, G)["basis"]
        assert (P.T @ P - torch.eye(RANK)).abs().max() <= 1e-5


@by_shape
@by_feedback
def test_where_gradients_have_fewer_directions_than_the_rank_the_old_columns_stay(shape, feedback):
    W, generator = weight(*shape, dtype=torch.float64), torch.Generator().manual_seed(8)
    optimizer = LDAdamW([W], rank=RANK, error_feedback=feedback)
    one, other = (torch.randn(side, 1, generator=generator, dtype=torch.float64) for side in shape)
    first = step(optimizer, W, one @ other.T)["basis"]
    for t in range(5):
        P = step(optimizer, W, (t % 3) * one @ other.T)["basis"]
        torch.testing.assert_close(P, first, rtol=0, atol=1e-6)


@by_shape
def test_a_gradient_of_the_ranks_directions_leaves_no_error(shape):
    """Of ever the same ones: the second step's subspace is theirs, too."""
    W = weight(*shape, dtype=torch.float64)
    optimizer = LDAdamW([W], rank=RANK)
    generator = torch.Generator().manual_seed(8)
    fixed = torch.randn(min(shape), RANK, generator=generator, dtype=torch.float64)
    for coordinates in gradients(RANK, max(shape), steps=10, dtype=torch.float64):
        state = step(optimizer, W, wide(fixed @ coordinates, is_right(shape)))
        assert state["error"].abs().max() <= 1e-10


@by_shape
def test_second_moments_stay_above_zero_where_their_carried_estimate_does_not(shape):
    """With a short second memory and a shrinking gradient, v - m * m is negative and so is what is carried."""
    W, right, (b1, b2) = weight(*shape, dtype=torch.float64), is_right(shape), (0.95, 0.3)
    optimizer = LDAdamW([W], rank=RANK, betas=(b1, b2))
    previous, negative = None, 0
    for t, G in enumerate(gradients(*shape, dtype=torch.float64)):
        state = step(optimizer, W, 0.8**t * G)
        assert (state["exp_avg_sq"] >= 0).all()
        if previous is not None:
            C = state["basis"].T @ previous["basis"]
            m, v = wide(previous["exp_avg"], right) / (1 - b1**t), wide(previous["exp_avg_sq"], right) / (1 - b2**t)
            carried = (1 - b2**t) * ((C * C) @ (v - m * m) + (C @ m) ** 2)
            negative += (carried < 0).sum().item()
            R = (wide(state["exp_avg"], right) - b1 * C @ wide(previous["exp_avg"], right)) / (1 - b1)
            V = b2 * carried.abs() + (1 - b2) * R * R
            torch.testing.assert_close(wide(state["exp_avg_sq"], right), V, rtol=1e-6, atol=1e-12)
        previous = state
    assert negative > 10


@pytest.mark.parametrize("shape", [(1, 20), (20, 1)])
def test_a_single_row_or_column_and_a_plain_vector_get_torchs_adamw(shape):
    ours, theirs, b, c = weight(*shape), weight(*shape), weight(9, seed=2), weight(9, seed=2)
    one = LDAdamW([{"params": [ours], "rank": 3}, {"params": [b]}], **KEYS)
    other = torch.optim.AdamW([theirs, c], **KEYS)
    for G, g in zip(gradients(*shape), gradients(9, seed=4), strict=True):
        ours.grad, theirs.grad, b.grad, c.grad = G.clone(), G.clone(), g.clone(), g.clone()
        one.step()
        other.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(b, c, rtol=0, atol=1e-6)


# ---- the error and the gradient are two tensors ---------------------------------------------------------------------


@by_shape
@by_feedback
def test_the_gradient_is_left_as_it_was(shape, feedback):
    W = weight(*shape)
    optimizer = LDAdamW([W], rank=RANK, error_feedback=feedback)
    for G in gradients(*shape, steps=4):
        step(optimizer, W, G)
        assert torch.equal(W.grad, G)


@by_shape
def test_clearing_and_clipping_gradients_between_steps_does_not_touch_the_error(shape):
    """The same run with gradients that were clipped beforehand and never cleared."""
    W, X = weight(*shape), weight(*shape)
    one, other = LDAdamW([W], rank=RANK), LDAdamW([X], rank=RANK)
    for G in gradients(*shape, steps=10):
        W.grad = G.clone()
        nn.utils.clip_grad_norm_([W], 0.5)
        clipped = W.grad.clone()
        assert clipped.norm() < 0.51 < G.norm()
        one.step()
        error = one.state[W]["error"].clone()
        nn.utils.clip_grad_norm_([W], 1e-3)
        assert torch.equal(one.state[W]["error"], error)
        one.zero_grad(set_to_none=True)
        assert W.grad is None
        assert torch.equal(one.state[W]["error"], error)
        assert torch.equal(error, step(other, X, clipped)["error"])
        assert torch.equal(W, X)


@by_shape
def test_a_step_without_a_gradient_keeps_the_error(shape):
    W = weight(*shape)
    optimizer = LDAdamW([W], rank=RANK)
    before = step(optimizer, W, gradients(*shape, steps=1)[0])
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert all(torch.equal(optimizer.state[W][key], value) for key, value in before.items())


# ---- state ----------------------------------------------------------------------------------------------------------


@by_shape
@by_feedback
@pytest.mark.parametrize("saved_at", [1, 2, 6])
def test_training_continues_to_the_bit_after_a_file(shape, feedback, saved_at, tmp_path):
    """Also after a first step: what is loaded must not take the second for the first."""
    W, sequence = weight(*shape), gradients(*shape, steps=10)
    optimizer = LDAdamW([W], rank=RANK, error_feedback=feedback)
    for G in sequence[:saved_at]:
        step(optimizer, W, G)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    X = nn.Parameter(W.detach().clone())
    resumed = LDAdamW([X], rank=RANK, error_feedback=feedback)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for G in sequence[saved_at:]:
        one, other = step(optimizer, W, G), step(resumed, X, G)
        assert torch.equal(W, X)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@by_shape
@by_feedback
def test_a_bf16_matrix_has_the_fp32_state_of_an_fp32_one_given_the_same_gradients(shape, feedback):
    low, high = weight(*shape, dtype=torch.bfloat16), weight(*shape)
    keys = {"rank": RANK, "error_feedback": feedback, "lr": 0.01}
    one, other = LDAdamW([low], **keys), LDAdamW([high], **keys)
    for G in gradients(*shape, dtype=torch.bfloat16):
        narrow, full = step(one, low, G), step(other, high, G.float())
        assert {value.dtype for value in narrow.values()} == {torch.float32}
        assert all(torch.equal(narrow[key], full[key]) for key in full)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), high, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rho": 1.5}, ["rho", "1.5"]),
        ({"rho": -0.1}, ["rho", "-0.1"]),
        ({"error_feedback": "fp32"}, ["error_feedback", "'fp32'"]),
    ],
)
def test_bad_values_are_refused(keys, words):
    with pytest.raises(ValueError) as error:
        LDAdamW([weight(4, 4)], rank=2, **keys)
    assert all(word in str(error.value) for word in words)
