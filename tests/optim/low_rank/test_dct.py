"""DCT-AdamW: its basis, the choice of columns, moments that follow them and the error that is kept."""

import itertools

import numpy as np
import pytest
import scipy.fft
import torch
from torch import nn

from gracile.optim import DCTAdamW, state_bytes
from gracile.optim.low_rank.cosine import best_columns, cosine_basis

SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (16, 16)}
RANK = 5
FEEDBACKS = [None, "fp32", "8bit", "4bit"]

by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_feedback = pytest.mark.parametrize("feedback", FEEDBACKS)


# ---- helpers --------------------------------------------------------------------------------------------------------


def weight(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype))


def gradients(*shape, steps=30, seed=1, dtype=torch.float32):
    """Noise around a slow walk: from one step to the next some columns stay the largest and some do not."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    return [G.to(dtype) for G in noise + noise.cumsum(dim=0) / 2]


def scipy_basis(k):
    """The orthonormal DCT-II matrix in fp64: unit vectors, transformed."""
    return torch.from_numpy(scipy.fft.dct(np.eye(k), type=2, norm="ortho", axis=0))


def is_right(shape, proj_type="std"):
    m, n = shape
    return {"std": m >= n, "reverse_std": m < n, "left": False, "right": True}[proj_type]


def scores_of(A, ell):
    """sum |S|^ell over the longer side of a matrix, for each cosine of the shorter one."""
    axis = 1 if is_right(A.shape) else 0
    S = scipy.fft.dct(A.double().numpy(), type=3, norm="ortho", axis=axis)
    return torch.from_numpy((abs(S) ** ell).sum(axis=1 - axis))


def step(optimizer, W, G):
    W.grad = G.clone()
    optimizer.step()
    return optimizer.state[W]


def columns_of(state, shape):
    return scipy_basis(min(shape))[:, state["indices"].long()]


def dense(W, sequence, *, rank, right, gap, rotate, ell, feedback, lr, betas, eps, decay):
    """The weight after every step: fp64, dense products throughout, the rotation as a product with r x r."""
    W = W.detach().double() if right else W.detach().double().T
    Q, (b1, b2) = scipy_basis(W.shape[1]), betas
    E, M, V, indices = torch.zeros_like(W), 0.0, 0.0, None
    for t, G in enumerate(sequence, start=1):
        A = (G.double() if right else G.double().T) + (E if feedback else 0)
        if t == 1 or t % gap == 0:
            scores = (A @ Q).abs().pow(ell).sum(dim=0)
            chosen = sorted(range(len(scores)), key=lambda j: (-scores[j].item(), j))[:rank]
            if rotate and indices is not None:
                turn = Q[:, indices].T @ Q[:, chosen]
                M, V = M @ turn, (V @ turn).abs()
            indices = chosen
        P = Q[:, indices]
        R = A @ P
        E = A - R @ P.T
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
        N = (M / (1 - b1**t)) / ((V / (1 - b2**t)).sqrt() + eps)
        W = (1 - lr * decay) * W - lr * N @ P.T
        yield W if right else W.T


def error_of(state, shape):
    """The kept error, read code by code where it has codes: a line in each row, columns on the left."""
    codes = state["error"]
    if codes.dtype == torch.float32:
        return codes.double()
    if codes.shape[1] != min(shape):
        codes = torch.stack([codes % 16, codes // 16], dim=2).reshape(codes.shape[0], -1)[:, : min(shape)]
    lines = codes.double() * state["error_scale"].double() + state["error_minimum"].double()
    return lines if is_right(shape) else lines.T


# ---- the basis ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 24, 1000])
def test_the_cosine_basis_is_scipys_dct_and_orthogonal_to_1e_6(k):
    Q = cosine_basis(k, torch.device("cpu"))
    assert Q.dtype == torch.float32
    torch.testing.assert_close(Q.double(), scipy_basis(k), rtol=0, atol=1e-7)
    for product in (Q.double() @ Q.double().T, Q.double().T @ Q.double()):
        assert (product - torch.eye(k, dtype=torch.float64)).abs().max() <= 1e-6


def test_products_with_it_are_the_transform_of_type_2_and_its_inverse_of_type_3():
    Q, (A,) = cosine_basis(24, torch.device("cpu")).double(), gradients(40, 24, steps=1, dtype=torch.float64)
    for product, kind in ((A @ Q.T, 2), (A @ Q, 3)):
        wanted = torch.from_numpy(scipy.fft.dct(A.numpy(), type=kind, norm="ortho", axis=1))
        torch.testing.assert_close(product, wanted, rtol=0, atol=1e-5)


# ---- the choice of columns ------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("ell", [1, 2])
def test_the_largest_columns_in_the_asked_norm_are_chosen_largest_first(shape, ell):
    W = weight(*shape)
    optimizer = DCTAdamW([W], rank=RANK, ell_norm=ell)
    for G in gradients(*shape, steps=10):
        chosen = step(optimizer, W, G)["indices"]
        assert chosen.tolist() == scores_of(G, ell).sort(descending=True).indices[:RANK].tolist()


def test_the_two_norms_choose_differently():
    """One cosine has a single large entry, another many small ones: the 2-norm wants the first."""
    S = torch.zeros(20, 12, dtype=torch.float64)
    S[0, 3], S[:, 7] = 4.0, 0.5
    G = (S @ scipy_basis(12).T).float()
    chosen = {}
    for ell in (1, 2):
        W = weight(20, 12)
        chosen[ell] = step(DCTAdamW([W], rank=1, ell_norm=ell), W, G)["indices"].tolist()
    assert chosen == {1: [7], 2: [3]}


@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
def test_in_the_2_norm_no_other_set_of_columns_drops_less(shape):
    """Against all 35 sets of 3 of 7; what is dropped is what a first step leaves in the error."""
    Q = scipy_basis(7)
    for G in gradients(*shape, steps=5, dtype=torch.float64):
        W = weight(*shape, dtype=torch.float64)
        E = step(DCTAdamW([W], rank=3, ell_norm=2, error_feedback="fp32"), W, G)["error"].double()
        top = scores_of(G, 2).sort(descending=True).values[:3].sum()
        torch.testing.assert_close(E.square().sum(), G.square().sum() - top, rtol=1e-5, atol=0)
        A = G if is_right(shape) else G.T
        dropped = [
            (A - A @ Q[:, list(kept)] @ Q[:, list(kept)].T).square().sum()
            for kept in itertools.combinations(range(7), 3)
        ]
        torch.testing.assert_close(E.square().sum(), min(dropped), rtol=1e-5, atol=0)


def test_ties_go_to_the_lower_index():
    assert best_columns(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 3, 2]
    assert best_columns(torch.ones(5000), 400).tolist() == list(range(400))
    alternating = torch.arange(5000) % 2
    assert best_columns(alternating.float(), 400).tolist() == list(range(1, 800, 2))


@by_shape
def test_a_zero_gradient_chooses_the_first_columns(shape):
    W = weight(*shape)
    optimizer = DCTAdamW([W], rank=RANK)
    (G,) = gradients(*shape, steps=1)
    assert step(optimizer, W, G)["indices"].tolist() != list(range(RANK))
    assert step(optimizer, W, torch.zeros(shape))["indices"].tolist() == list(range(RANK))


@by_shape
@pytest.mark.parametrize(("gap", "choices"), [(1, range(1, 10)), (3, [1, 3, 6, 9]), (4, [1, 4, 8])])
def test_columns_are_chosen_at_steps_1_t_and_2t(shape, gap, choices):
    """The gradient of step t lies in cosines of its own, so that an index tells when it was chosen."""
    W, Q = weight(*shape), scipy_basis(min(shape))
    optimizer = DCTAdamW([W], rank=2, update_proj_gap=gap)
    generator = torch.Generator().manual_seed(3)
    latest = None
    for t in range(1, 10):
        S = torch.randn(max(shape), 2, generator=generator, dtype=torch.float64)
        G = S @ Q[:, [t, t + 1]].T
        state = step(optimizer, W, (G if is_right(shape) else G.T).float())
        if t in choices:
            latest = {t, t + 1}
        assert set(state["indices"].tolist()) == latest


# ---- moments --------------------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("rotate", [True, False])
def test_moments_move_with_their_columns_as_a_product_with_the_change_of_basis_would(shape, rotate):
    W, right, (b1, b2) = weight(*shape), is_right(shape), (0.7, 0.9)
    optimizer = DCTAdamW([W], rank=RANK, betas=(b1, b2), rotate_subspace=rotate)
    sequence = gradients(*shape, steps=12)
    state = {k: v.clone() for k, v in step(optimizer, W, sequence[0]).items()}
    overlaps = set()
    for G in sequence[1:]:
        P = columns_of(state, shape)
        M, V = state["exp_avg"].double(), state["exp_avg_sq"].double()
        state = {k: v.clone() for k, v in step(optimizer, W, G).items()}
        turn = P.T @ columns_of(state, shape)
        overlaps.add(round(turn.square().sum().item()))
        if rotate:
            M = M @ turn if right else turn.T @ M
            V = (V @ turn if right else turn.T @ V).abs()
        R = G.double() @ columns_of(state, shape) if right else columns_of(state, shape).T @ G.double()
        torch.testing.assert_close(state["exp_avg"].double(), b1 * M + (1 - b1) * R, rtol=0, atol=1e-5)
        torch.testing.assert_close(state["exp_avg_sq"].double(), b2 * V + (1 - b2) * R**2, rtol=1e-5, atol=1e-5)
    assert overlaps & set(range(1, RANK))


def test_a_column_that_left_comes_back_with_nothing():
    W, Q = weight(20, 12), scipy_basis(12)
    optimizer = DCTAdamW([W], rank=1, betas=(0.5, 0.5), rotate_subspace=True)
    S = torch.randn(20, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for column in (4, 9, 4):
        state = step(optimizer, W, (S @ Q[:, [column]].T).float())
        assert state["indices"].tolist() == [column]
        torch.testing.assert_close(state["exp_avg"].double(), 0.5 * S, rtol=0, atol=1e-5)


SIDES = [(shape, "std") for shape in SHAPES.values()]
SIDES += [((20, 12), "left"), ((20, 12), "reverse_std"), ((12, 20), "right"), ((16, 16), "left")]


@pytest.mark.parametrize(("shape", "proj_type"), SIDES)
@pytest.mark.parametrize("gap", [1, 7])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("ell", "feedback"), [(1, None), (2, "fp32")])
def test_a_run_follows_a_dense_loop_in_fp64(shape, proj_type, gap, rotate, ell, feedback):
    """eps of the size of the second moments: where it is added shows."""
    W, right = weight(*shape, dtype=torch.float64), is_right(shape, proj_type)
    keys = {"rank": RANK, "lr": 0.01, "betas": (0.9, 0.99), "eps": 0.1}
    sequence = gradients(*shape, dtype=torch.float64)
    wanted = dense(W, sequence, right=right, gap=gap, rotate=rotate, ell=ell, feedback=feedback, decay=0.3, **keys)
    switches = {"update_proj_gap": gap, "ell_norm": ell, "rotate_subspace": rotate, "error_feedback": feedback}
    optimizer = DCTAdamW([W], weight_decay=0.3, proj_type=proj_type, **switches, **keys)
    start = W.detach().clone()
    for G, expected in zip(sequence, wanted, strict=True):
        step(optimizer, W, G)
        torch.testing.assert_close(W.detach(), expected, rtol=0, atol=2e-7)
    assert (W - start).abs().max() > 0.05


@by_shape
@pytest.mark.parametrize("rank", [16, 100])
def test_at_full_rank_nothing_is_lost_and_torchs_adamw_in_rotated_coordinates_is_left(shape, rank):
    W, right, Q = weight(*shape, dtype=torch.float64), is_right(shape), scipy_basis(min(shape))
    keys = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 0.1, "weight_decay": 0.3}
    X = nn.Parameter(W.detach() @ Q if right else Q.T @ W.detach())
    ours, rotated = (
        DCTAdamW([W], rank=rank, error_feedback="fp32", rotate_subspace=True, **keys),
        torch.optim.AdamW([X], **keys),
    )
    for G in gradients(*shape, dtype=torch.float64):
        state = step(ours, W, G)
        X.grad = G @ Q if right else Q.T @ G
        rotated.step()
        assert state["error"].abs().max() <= 1e-5
        assert sorted(state["indices"].tolist()) == list(range(min(shape)))
        torch.testing.assert_close(W.detach(), (X @ Q.T if right else Q @ X).detach(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("shape", [(1, 20), (20, 1)])
def test_a_single_row_or_column_and_a_plain_vector_get_torchs_adamw(shape):
    ours, theirs, b, c = weight(*shape), weight(*shape), weight(9, seed=2), weight(9, seed=2)
    keys = {"lr": 0.01, "eps": 0.1, "weight_decay": 0.3}
    one = DCTAdamW([{"params": [ours], "rank": 3}, {"params": [b]}], **keys)
    other = torch.optim.AdamW([theirs, c], **keys)
    for G, g in zip(gradients(*shape), gradients(9, seed=4), strict=True):
        ours.grad, theirs.grad, b.grad, c.grad = G.clone(), G.clone(), g.clone(), g.clone()
        one.step()
        other.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(b, c, rtol=0, atol=1e-6)


# ---- error feedback -------------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("feedback", ["fp32", "8bit", "4bit"])
@pytest.mark.parametrize("gap", [1, 4])
def test_what_the_step_does_not_use_is_kept(shape, feedback, gap):
    """R P^T + E_new = G + E_old, with codes to half a step of each line's range; b1 = 0 leaves R in the moment."""
    W, right = weight(*shape), is_right(shape)
    optimizer = DCTAdamW([W], rank=RANK, betas=(0.0, 0.99), error_feedback=feedback, update_proj_gap=gap)
    E = torch.zeros(shape, dtype=torch.float64)
    for G in gradients(*shape, steps=15):
        state = step(optimizer, W, G)
        R, P = state["exp_avg"].double(), columns_of(state, shape)
        left_over = G.double() + E - (R @ P.T if right else P @ R)
        E = error_of(state, shape)
        scale = (G.abs().max() + E.abs().max()).item()
        if feedback == "fp32":
            allowed = torch.zeros(shape[0], 1)
        else:
            steps = 2 ** int(feedback.removesuffix("bit")) - 1
            along = 1 if right else 0
            low, high = left_over.amin(dim=along, keepdim=True), left_over.amax(dim=along, keepdim=True)
            allowed = (high - low) / steps / 2
        assert ((left_over - E).abs() <= allowed + 1e-6 * scale).all()
        assert E.norm() > 0.1 * G.norm()


@by_shape
@by_feedback
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gradient_is_left_as_it_was(shape, feedback, dtype):
    W = weight(*shape, dtype=dtype)
    optimizer = DCTAdamW([W], rank=RANK, error_feedback=feedback)
    for G in gradients(*shape, steps=3, dtype=dtype):
        step(optimizer, W, G)
        assert torch.equal(W.grad, G)


# ---- state ----------------------------------------------------------------------------------------------------------


@by_shape
@by_feedback
def test_a_bf16_matrix_has_the_state_of_an_fp32_one_given_the_same_gradients(shape, feedback):
    low, high = weight(*shape, dtype=torch.bfloat16), weight(*shape)
    keys = {"rank": RANK, "error_feedback": feedback, "lr": 0.01}
    one, other = DCTAdamW([low], **keys), DCTAdamW([high], **keys)
    for G in gradients(*shape, dtype=torch.bfloat16):
        narrow, wide = step(one, low, G), step(other, high, G.float())
        assert all(narrow[key].dtype == wide[key].dtype and torch.equal(narrow[key], wide[key]) for key in wide)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), high, rtol=0, atol=0.02)


@by_shape
@by_feedback
def test_bytes_are_those_of_the_formula(shape, feedback):
    W = weight(*shape)
    optimizer = DCTAdamW([W], rank=RANK, error_feedback=feedback)
    state = step(optimizer, W, gradients(*shape, steps=1)[0])
    m, n = shape
    error = {None: 0, "fp32": 4 * m * n, "8bit": m * n + 8 * max(shape), "4bit": m * n // 2 + 8 * max(shape)}[feedback]
    assert state["indices"].dtype == torch.int32
    wanted = 4 * 2 * RANK * max(shape) + 4 * RANK + 4 + error
    assert state_bytes(optimizer) == DCTAdamW.state_bytes_for(shape, rank=RANK, error_feedback=feedback) == wanted


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ell_norm": 3}, ["ell_norm", "3"]),
        ({"rotate_subspace": 1}, ["rotate_subspace", "1"]),
        ({"error_feedback": "2bit"}, ["error_feedback", "'2bit'", "4bit"]),
        ({"error_feedback": True}, ["error_feedback", "True"]),
    ],
)
def test_bad_values_are_refused(keys, words):
    with pytest.raises(ValueError) as error:
        DCTAdamW([weight(4, 4)], rank=2, **keys)
    assert all(word in str(error.value) for word in words)
