"""GaLore: the authors' arithmetic, the properties of the paper, and behaviour as a drop-in of torch.optim."""

import contextlib
import copy
import warnings
from functools import partial

import galore_torch
import pytest
import torch
from torch import nn

from gracile import optim

# the authors' exact singular vectors; the default is one cheap iteration
GaLoreAdamW = partial(optim.GaLoreAdamW, subspace_method="svd")

SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (16, 16)}
PROJ_TYPES = ["std", "reverse_std", "left", "right"]
RANK = 4
GAP = 20
STEPS = 50

by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
by_proj_type = pytest.mark.parametrize("proj_type", PROJ_TYPES)


# ---- helpers --------------------------------------------------------------------------------------------------------


def projects_right(shape, proj_type):
    """Whether P stands on the right: the expected side, told apart from the code under test."""
    m, n = shape
    return proj_type == "right" or (proj_type == "std" and m >= n) or (proj_type == "reverse_std" and m < n)


def weight(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter((0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype))


def gradients(*shape, steps=STEPS, seed=1, dtype=torch.float32):
    """A sequence of gradients that change much in direction and some in size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 1 + 0.5 * torch.cos(torch.arange(steps, dtype=torch.float64))
    return [(s * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype) for s in sizes]


def ranked(parameter, **keys):
    return {"params": [parameter], "rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"} | keys


def follow(optimizer, parameter, sequence):
    """Step through given gradients; the parameter after every step."""
    trajectory = []
    for G in sequence:
        parameter.grad = G.clone()
        optimizer.step()
        trajectory.append(parameter.detach().clone())
    return trajectory


def reference(groups, **keys):
    """The authors' optimizer on copies of the parameters, and these copies."""
    twins = [{**group, "params": [nn.Parameter(p.detach().clone()) for p in group["params"]]} for group in groups]
    optimizer = galore_torch.GaLoreAdamW(twins, no_deprecation_warning=True, **keys)
    return optimizer, [p for group in twins for p in group["params"]]


def basis_of(optimizer, parameter):
    return optimizer.state[parameter]["basis"]


def projector(columns):
    """P P^T, which does not depend on signs."""
    return columns @ columns.mT


def largest_difference(left, right):
    return (left - right).abs().max().item()


# ---- parity with the authors' code ----------------------------------------------------------------------------------


@by_shape
@by_proj_type
def test_given_gradients_lead_where_galore_torch_leads(shape, proj_type):
    """50 steps, refreshes at 0, 20 and 40, decay, and a plain matrix and vector beside the projected matrix."""
    matrix, plain, vector = weight(*shape), weight(10, 30, seed=2), weight(30, seed=3)
    groups = [ranked(matrix, proj_type=proj_type, weight_decay=0.2), {"params": [plain, vector], "weight_decay": 0.1}]
    theirs, twins = reference(groups, lr=0.01)
    ours, parameters = GaLoreAdamW(groups, lr=0.01), [matrix, plain, vector]
    start = [p.detach().clone() for p in parameters]
    sequences = [gradients(*p.shape, seed=seed) for seed, p in enumerate(parameters)]
    for t in range(STEPS):
        for p, twin, sequence in zip(parameters, twins, sequences, strict=True):
            p.grad, twin.grad = sequence[t].clone(), sequence[t].clone()
        ours.step()
        theirs.step()
        for p, twin in zip(parameters, twins, strict=True):
            assert largest_difference(p, twin) <= 1e-6
    assert all(largest_difference(p, before) > 0.02 for p, before in zip(parameters, start, strict=True))
    P = theirs.state[twins[0]]["projector"].ortho_matrix
    assert largest_difference(basis_of(ours, matrix), P.t() if projects_right(shape, proj_type) else P) <= 1e-6


@by_shape
@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
def test_least_squares_leads_where_galore_torch_leads(shape, proj_type):
    """The gradients now follow from the weights, so that a difference would feed on itself."""
    m, n = shape
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, n, generator=generator)
    target = x @ (0.04 * torch.randn(n, m, generator=generator)) + 0.1 * torch.randn(64, m, generator=generator)
    W, b = weight(m, n), weight(m, seed=5)
    groups = [ranked(W, proj_type=proj_type, weight_decay=0.5), {"params": [b]}]
    theirs, twins = reference(groups, lr=0.003)
    ours = GaLoreAdamW(groups, lr=0.003)
    losses = []
    for _ in range(STEPS):
        for optimizer, (A, c) in ((theirs, twins), (ours, (W, b))):
            optimizer.zero_grad()
            loss = (x @ A.t() + c - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        assert largest_difference(W, twins[0]) <= 1e-6
        assert largest_difference(b, twins[1]) <= 1e-6
    assert losses[-1] < 0.9 * losses[0]


@by_shape
@by_proj_type
@pytest.mark.parametrize("scale", [0.25, 0.3])
def test_weights_of_size_one_stay_on_the_bits_of_galore_torch(shape, proj_type, scale):
    """At this size one rounding is 1e-7, and a sign that flips at a refresh is 1e-2: only the same bits stay close.

    The same calls of BLAS on the same memory layout give them, whatever the processor.
    """
    m, n = shape
    generator = torch.Generator().manual_seed(6)
    W, b = nn.Parameter(torch.randn(m, n, generator=generator)), weight(m, seed=7)
    x = torch.randn(64, n, generator=generator)
    target = x @ torch.randn(n, m, generator=generator)
    groups = [ranked(W, proj_type=proj_type, scale=scale, weight_decay=0.1), {"params": [b]}]
    theirs, twins = reference(groups, lr=0.01)
    ours = GaLoreAdamW(groups, lr=0.01)
    for _ in range(STEPS):
        for optimizer, (A, c) in ((theirs, twins), (ours, (W, b))):
            optimizer.zero_grad()
            (x @ A.t() + c - target).square().mean().backward()
            optimizer.step()
        assert torch.equal(W, twins[0])
        assert torch.equal(b, twins[1])


@by_shape
@by_proj_type
def test_fp64_weights_follow_the_dense_oracle(oracle, shape, proj_type):
    """Three refreshes at which the moments are kept, decay after the step, a second beta that makes bias matter."""
    W, sequence = weight(*shape, dtype=torch.float64), gradients(*shape, dtype=torch.float64)
    keys = {"rank": RANK, "scale": 0.5, "lr": 0.01, "betas": (0.8, 0.97), "eps": 1e-3}
    right = projects_right(shape, proj_type)
    expected = oracle.galore(W.detach(), sequence, right=right, gap=GAP, decay=0.3, **keys)
    optimizer = GaLoreAdamW([W], update_proj_gap=GAP, weight_decay=0.3, proj_type=proj_type, **keys)
    for got, wanted in zip(follow(optimizer, W, sequence), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@by_shape
def test_at_full_rank_it_is_adam_in_the_rotated_basis(oracle, shape):
    """Rank = short side, scale 1, one refresh: nothing is dropped. It is not Adam itself, which rotation changes."""
    m, n = shape
    W, sequence = weight(*shape, dtype=torch.float64), gradients(*shape, dtype=torch.float64)
    start = W.detach().clone()
    optimizer = GaLoreAdamW([W], lr=0.01, rank=min(shape), scale=1.0, update_proj_gap=10**6)
    trajectory = follow(optimizer, W, sequence)

    tall = [G if m >= n else G.t() for G in sequence]
    rotation = torch.linalg.eigh(tall[0].t() @ tall[0]).eigenvectors  # signs and order do not matter to Adam
    expected = oracle.adam_in_rotated_basis(start if m >= n else start.t(), tall, rotation, lr=0.01)
    for got, wanted in zip(trajectory, expected, strict=True):
        torch.testing.assert_close(got if m >= n else got.t(), wanted, rtol=0, atol=1e-12)
    unrotated = oracle.adam_in_rotated_basis(start, sequence, torch.eye(n, dtype=torch.float64), lr=0.01)
    assert largest_difference(trajectory[-1], unrotated[-1]) > 0.01


def test_a_group_without_a_rank_is_torch_adamw_where_eps_vanishes():
    """At eps = 0 and without decay the two forms of AdamW agree."""
    ours, theirs = weight(9, 7, dtype=torch.float64), weight(9, 7, dtype=torch.float64)
    sequence = gradients(9, 7, dtype=torch.float64)
    got = follow(GaLoreAdamW([ours], lr=0.01, eps=0.0), ours, sequence)
    wanted = follow(torch.optim.AdamW([theirs], lr=0.01, eps=0.0, weight_decay=0.0), theirs, sequence)
    torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=0, atol=1e-12)


# ---- the side and the rank ------------------------------------------------------------------------------------------


@by_shape
@by_proj_type
def test_the_side_is_decided_by_the_shape(shape, proj_type):
    m, n = shape
    W = weight(*shape)
    optimizer = GaLoreAdamW([ranked(W, proj_type=proj_type)])
    follow(optimizer, W, gradients(*shape, steps=1))
    right = projects_right(shape, proj_type)
    assert basis_of(optimizer, W).shape == ((n, RANK) if right else (m, RANK))
    assert optimizer.state[W]["exp_avg"].shape == ((m, RANK) if right else (RANK, n))
    assert optimizer.state[W]["exp_avg_sq"].shape == optimizer.state[W]["exp_avg"].shape


@by_shape
def test_reverse_std_is_the_other_side(shape):
    """On a matrix of unequal sides it replaces the longer one; on a square one, left where std is right."""
    other = "left" if shape[0] >= shape[1] else "right"
    W, twin = weight(*shape), weight(*shape)
    reverse = follow(GaLoreAdamW([ranked(W, proj_type="reverse_std")]), W, gradients(*shape))
    named = follow(GaLoreAdamW([ranked(twin, proj_type=other)]), twin, gradients(*shape))
    assert torch.equal(torch.stack(reverse), torch.stack(named))
    short = weight(*shape)
    std = follow(GaLoreAdamW([ranked(short)]), short, gradients(*shape))
    assert largest_difference(std[-1], reverse[-1]) > 1e-3


@by_shape
@by_proj_type
def test_a_rank_above_the_short_side_is_capped(shape, proj_type):
    huge, full = weight(*shape), weight(*shape)
    many = GaLoreAdamW([ranked(huge, rank=1000, proj_type=proj_type)], lr=0.01)
    exact = GaLoreAdamW([ranked(full, rank=min(shape), proj_type=proj_type)], lr=0.01)
    got, wanted = follow(many, huge, gradients(*shape)), follow(exact, full, gradients(*shape))
    assert torch.equal(torch.stack(got), torch.stack(wanted))
    assert basis_of(many, huge).shape[1] == min(shape)


@pytest.mark.parametrize("shape", [(1, 16), (16, 1)])
@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
def test_a_matrix_of_one_line_follows_galore_torch(shape, proj_type):
    W = weight(*shape)
    group = ranked(W, proj_type=proj_type, update_proj_gap=7)
    theirs, (twin,) = reference([group], lr=0.01)
    got, wanted = follow(GaLoreAdamW([group], lr=0.01), W, gradients(*shape)), follow(theirs, twin, gradients(*shape))
    torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 16), (16, 1)])
def test_one_line_is_its_own_subspace(shape):
    """Replacing a side of length one by one coordinate drops nothing and rotates nothing: plain AdamW."""
    W, plain = weight(*shape), weight(*shape)
    projected = follow(GaLoreAdamW([ranked(W, scale=1.0, update_proj_gap=10**6)]), W, gradients(*shape))
    whole = follow(GaLoreAdamW([plain]), plain, gradients(*shape))
    torch.testing.assert_close(torch.stack(projected), torch.stack(whole), rtol=0, atol=1e-7)


# ---- properties of the subspace -------------------------------------------------------------------------------------


@by_shape
@by_proj_type
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_basis_is_orthonormal_after_every_refresh(shape, proj_type, dtype, bound):
    W = weight(*shape, dtype=dtype)
    optimizer = GaLoreAdamW([ranked(W, proj_type=proj_type, update_proj_gap=1)])
    for G in gradients(*shape, steps=3, dtype=dtype):
        follow(optimizer, W, [G])
        P = basis_of(optimizer, W)
        assert P.dtype == dtype
        assert largest_difference(P.double().t() @ P.double(), torch.eye(RANK, dtype=torch.float64)) < bound


@by_shape
@by_proj_type
def test_a_refresh_drops_exactly_the_small_singular_values(shape, proj_type):
    """||G - G P P^T||^2 is the sum of the sigma_i^2 with i > r: no subspace of rank r drops less."""
    W, (G,) = weight(*shape, dtype=torch.float64), gradients(*shape, steps=1, dtype=torch.float64)
    optimizer = GaLoreAdamW([ranked(W, proj_type=proj_type)])
    follow(optimizer, W, [G])
    P = projector(basis_of(optimizer, W))
    outside = G - (G @ P if projects_right(shape, proj_type) else P @ G)
    dropped = torch.linalg.svdvals(G)[RANK:].square().sum()
    assert dropped > 1
    torch.testing.assert_close(outside.square().sum(), dropped, rtol=1e-12, atol=0)


@by_shape
@by_proj_type
def test_a_gradient_of_low_rank_lies_inside_its_subspace(shape, proj_type):
    m, n = shape
    G = gradients(m, 3, steps=1, dtype=torch.float64)[0] @ gradients(3, n, steps=1, dtype=torch.float64)[0]
    W = weight(*shape, dtype=torch.float64)
    optimizer = GaLoreAdamW([ranked(W, rank=3, proj_type=proj_type)])
    follow(optimizer, W, [G])
    P = projector(basis_of(optimizer, W))
    torch.testing.assert_close(G @ P if projects_right(shape, proj_type) else P @ G, G, rtol=0, atol=1e-12)


@by_shape
@by_proj_type
def test_every_update_has_the_rank_of_the_subspace(shape, proj_type):
    W = weight(*shape, dtype=torch.float64)
    before = W.detach().clone()
    optimizer = GaLoreAdamW([ranked(W, proj_type=proj_type, update_proj_gap=3)], lr=1.0)
    for after in follow(optimizer, W, gradients(*shape, steps=8, dtype=torch.float64)):
        sigma = torch.linalg.svdvals(after - before)
        assert sigma[RANK - 1] > 1e-3 * sigma[0]
        assert sigma[RANK] < 1e-12 * sigma[0]
        before = after


@by_shape
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_transposing_weight_and_gradient_transposes_the_result(shape, proj_type):
    """One refresh: the sign of a singular vector is the driver's choice, and only a second refresh can tell."""
    mirror = {"left": "right", "right": "left"}[proj_type]
    W, sequence = weight(*shape, dtype=torch.float64), gradients(*shape, dtype=torch.float64)
    Wt = nn.Parameter(W.detach().t().clone())
    straight = GaLoreAdamW([ranked(W, proj_type=proj_type, update_proj_gap=STEPS)], lr=0.01, weight_decay=0.1)
    mirrored = GaLoreAdamW([ranked(Wt, proj_type=mirror, update_proj_gap=STEPS)], lr=0.01, weight_decay=0.1)
    follow(straight, W, sequence)
    follow(mirrored, Wt, [G.t() for G in sequence])
    torch.testing.assert_close(W.detach().t(), Wt.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [SHAPES["tall"], SHAPES["wide"]], ids=["tall", "wide"])
def test_std_treats_a_matrix_and_its_transpose_alike(shape):
    W, sequence = weight(*shape, dtype=torch.float64), gradients(*shape, dtype=torch.float64)
    Wt = nn.Parameter(W.detach().t().clone())
    follow(GaLoreAdamW([ranked(W, update_proj_gap=STEPS)], lr=0.01), W, sequence)
    follow(GaLoreAdamW([ranked(Wt, update_proj_gap=STEPS)], lr=0.01), Wt, [G.t() for G in sequence])
    torch.testing.assert_close(W.detach().t(), Wt.detach(), rtol=0, atol=1e-12)


def test_scale_and_learning_rate_multiply_the_projected_update_only():
    moves = []
    for scale, lr in ((0.25, 0.01), (0.5, 0.01), (0.25, 0.02)):
        W, plain = weight(20, 12, dtype=torch.float64), weight(20, 12, dtype=torch.float64)
        start = W.detach().clone()
        optimizer = GaLoreAdamW([ranked(W, scale=scale), {"params": [plain]}], lr=lr)
        plain.grad = gradients(20, 12, steps=1, dtype=torch.float64)[0]
        follow(optimizer, W, gradients(20, 12, steps=1, dtype=torch.float64))
        moves.append((W.detach() - start, plain.detach() - start))
    torch.testing.assert_close(2 * moves[0][0], moves[1][0])
    torch.testing.assert_close(2 * moves[0][0], moves[2][0])
    torch.testing.assert_close(moves[0][1], moves[1][1])
    torch.testing.assert_close(2 * moves[0][1], moves[2][1])


# ---- the clock ------------------------------------------------------------------------------------------------------


@by_shape
@pytest.mark.parametrize("gap", [1, 4])
def test_the_subspace_changes_exactly_at_multiples_of_the_gap(shape, gap):
    W = weight(*shape)
    optimizer = GaLoreAdamW([ranked(W, update_proj_gap=gap)])
    changed = []
    before = None
    for t, G in enumerate(gradients(*shape, steps=3 * gap + 1)):
        follow(optimizer, W, [G])
        P = basis_of(optimizer, W).clone()
        if before is None or not torch.equal(P, before):
            changed.append(t)
        before = P
    assert changed == [0, gap, 2 * gap, 3 * gap]


def test_a_refresh_uses_the_gradient_of_its_own_step():
    W, sequence = weight(12, 20), gradients(12, 20, steps=5)
    optimizer = GaLoreAdamW([ranked(W, update_proj_gap=4)])
    follow(optimizer, W, sequence)
    U = torch.linalg.svd(sequence[4], full_matrices=False).U[:, :RANK]
    torch.testing.assert_close(projector(basis_of(optimizer, W)), projector(U), rtol=0, atol=1e-5)


def test_a_refresh_keeps_the_moments_and_the_counter():
    """With a zero gradient the moments only shrink, whatever the new subspace is."""
    W = weight(20, 12, dtype=torch.float64)
    optimizer = GaLoreAdamW([ranked(W, update_proj_gap=5)], betas=(0.9, 0.99))
    follow(optimizer, W, gradients(20, 12, steps=5, dtype=torch.float64))
    M, V = (optimizer.state[W][key].clone() for key in ("exp_avg", "exp_avg_sq"))
    follow(optimizer, W, [torch.zeros(20, 12, dtype=torch.float64)])
    torch.testing.assert_close(optimizer.state[W]["exp_avg"], 0.9 * M)
    torch.testing.assert_close(optimizer.state[W]["exp_avg_sq"], 0.99 * V)
    assert optimizer.state[W]["step"] == 6


def test_every_matrix_has_its_own_clock():
    """One whose first gradient comes late refreshes at its own steps 0, T, 2T."""
    early, late = weight(20, 12), weight(12, 20)
    optimizer = GaLoreAdamW([ranked(early, update_proj_gap=4), ranked(late, update_proj_gap=4)])
    changed = {early: [], late: []}
    for t in range(12):
        early.grad, late.grad = gradients(20, 12, steps=1, seed=t)[0], None
        if t >= 3:
            late.grad = gradients(12, 20, steps=1, seed=t)[0]
        before = {p: basis_of(optimizer, p).clone() if optimizer.state[p] else None for p in changed}
        optimizer.step()
        for p, steps in changed.items():
            if p.grad is not None and (before[p] is None or not torch.equal(before[p], basis_of(optimizer, p))):
                steps.append(t)
    assert changed == {early: [0, 4, 8], late: [3, 7, 11]}


# ---- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [RANK, None], ids=["projected", "plain"])
@pytest.mark.parametrize(
    ("dtype", "state_dtype", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_moments_are_fp32_at_least_unless_the_group_says_otherwise(rank, dtype, state_dtype, expected):
    W = weight(20, 12, dtype=dtype)
    optimizer = GaLoreAdamW([ranked(W, rank=rank, state_dtype=state_dtype)])
    follow(optimizer, W, gradients(20, 12, steps=2, dtype=dtype))
    state = optimizer.state[W]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == expected
    assert state["step"].dtype == torch.float32
    assert W.dtype == dtype
    assert W.isfinite().all()


@by_shape
def test_bf16_weights_stay_near_fp32_weights(shape):
    """The same bf16 gradients; bf16 keeps 8 bits, so a weight of 0.1 is exact to 0.0004 and rounds at every step."""
    sequence = gradients(*shape, dtype=torch.bfloat16)
    low, high = weight(*shape, dtype=torch.bfloat16), weight(*shape)
    rough = GaLoreAdamW([ranked(low)], lr=0.02)
    follow(rough, low, sequence)
    exact = GaLoreAdamW([ranked(high)], lr=0.02)
    follow(exact, high, [G.float() for G in sequence])
    assert (low.float() - high).norm() < 0.1 * (high - weight(*shape)).norm()
    M = exact.state[high]["exp_avg"]
    assert (rough.state[low]["exp_avg"] - M).norm() < 0.02 * M.norm()


@by_shape
def test_moments_in_bf16_are_those_of_galore_torch(shape):
    """Within what a sum in another order rounds differently; the weights are written with other roundings."""
    W = weight(*shape, dtype=torch.bfloat16)
    theirs, (twin,) = reference([ranked(W)])
    ours = GaLoreAdamW([ranked(W, state_dtype=torch.bfloat16)])
    follow(ours, W, gradients(*shape, dtype=torch.bfloat16))
    follow(theirs, twin, gradients(*shape, dtype=torch.bfloat16))
    for key in ("exp_avg", "exp_avg_sq"):
        got, wanted = ours.state[W][key], theirs.state[twin][key]
        assert got.dtype == wanted.dtype == torch.bfloat16
        assert (got.float() - wanted.float()).norm() < 1e-2 * wanted.float().norm()


def test_a_second_moment_in_fp32_follows_bf16_gradients_where_bf16_stalls():
    """After t equal gradients g it is (1 - b2^t) g^2. In bf16 the increments round away: why fp32 is the default."""
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        v = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimizer = GaLoreAdamW([v], lr=1e-3, state_dtype=dtype)
        follow(optimizer, v, [torch.full((8,), 2.0, dtype=torch.bfloat16)] * 1500)
        expected = (1 - 0.999**1500) * 4
        errors[dtype] = abs(optimizer.state[v]["exp_avg_sq"][0].item() / expected - 1)
    assert errors[torch.float32] < 1e-4
    assert errors[torch.bfloat16] > 0.1


# ---- what gradients can be ------------------------------------------------------------------------------------------


@by_shape
def test_an_all_zero_gradient_is_no_error_and_moves_nothing(shape):
    W = weight(*shape)
    before = W.detach().clone()
    optimizer = GaLoreAdamW([ranked(W, update_proj_gap=2)], lr=0.1)
    follow(optimizer, W, [torch.zeros(shape)] * 3)
    assert torch.equal(W, before)
    assert largest_difference(basis_of(optimizer, W).t() @ basis_of(optimizer, W), torch.eye(RANK)) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@by_shape
def test_a_gradient_that_is_not_finite_at_a_refresh_keeps_the_old_subspace(shape, bad):
    broken, sound = weight(*shape), weight(*shape)
    optimizer = GaLoreAdamW([ranked(broken, update_proj_gap=2), ranked(sound, update_proj_gap=2)])
    sequence = gradients(*shape, steps=7)
    for t, G in enumerate(sequence[:2]):
        broken.grad, sound.grad = G.clone(), sequence[t].clone()
        optimizer.step()
    kept, replaced = basis_of(optimizer, broken).clone(), basis_of(optimizer, sound).clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for G in sequence[2:]:  # refreshes at 2, 4 and 6
            broken.grad, sound.grad = G.clone(), G.clone()
            broken.grad[-1, -1] = bad
            optimizer.step()
    assert torch.equal(basis_of(optimizer, broken), kept)
    assert largest_difference(basis_of(optimizer, sound), replaced) > 0.01
    assert sound.isfinite().all()
    assert ["not finite" in str(warning.message) for warning in caught] == [True]


def test_the_first_gradient_not_finite_leaves_an_orthonormal_subspace():
    W = weight(20, 12)
    optimizer = GaLoreAdamW([ranked(W)])
    with pytest.warns(UserWarning, match="not finite"):
        follow(optimizer, W, [torch.full((20, 12), float("nan"))])
    assert torch.equal(basis_of(optimizer, W).t() @ basis_of(optimizer, W), torch.eye(RANK))


def test_a_gradient_that_is_not_finite_between_refreshes_is_no_business_of_the_subspace():
    W = weight(20, 12)
    optimizer = GaLoreAdamW([ranked(W)])
    follow(optimizer, W, gradients(20, 12, steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        follow(optimizer, W, [torch.full((20, 12), float("inf"))])


@by_shape
@by_proj_type
def test_when_the_svd_fails_the_same_subspace_is_found(shape, proj_type, monkeypatch):
    def fails(*_, **__):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    sequence = gradients(*shape, steps=1)
    W, twin = weight(*shape), weight(*shape)
    usual = GaLoreAdamW([ranked(W, proj_type=proj_type)], lr=0.01)
    follow(usual, W, sequence)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    rescued = GaLoreAdamW([ranked(twin, proj_type=proj_type)], lr=0.01)
    with pytest.warns(RuntimeWarning, match=f"SVD of a {shape[0]} x {shape[1]} gradient failed"):
        follow(rescued, twin, sequence)
    P, Q = basis_of(usual, W), basis_of(rescued, twin)
    assert P.shape == Q.shape
    assert largest_difference(projector(P), projector(Q)) < 1e-5
    assert largest_difference((P.t() @ Q).abs(), torch.eye(RANK)) < 1e-4  # the vectors themselves, up to sign
    assert largest_difference(W, twin) < 1e-6  # to Adam, signs do not matter


# ---- which parameters -----------------------------------------------------------------------------------------------


def test_a_parameter_without_a_gradient_waits_and_a_frozen_one_has_no_state():
    used, unused, frozen = weight(12, 20), weight(20, 12), weight(32, 32)
    frozen.requires_grad_(False)
    groups = [{"params": [used, unused, frozen], "rank": RANK}]
    before = unused.detach().clone(), frozen.clone()
    optimizer = GaLoreAdamW(groups, weight_decay=0.5)
    follow(optimizer, used, gradients(12, 20, steps=3))
    assert torch.equal(unused, before[0])
    assert torch.equal(frozen, before[1])
    assert optimizer.state[unused]["step"] == 0
    assert not optimizer.state[unused]["exp_avg"].any()
    assert frozen not in optimizer.state


def test_a_tied_weight_is_one_matrix_with_the_sum_of_its_gradients():
    first, second = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
    second.weight = first.weight
    tied = nn.Sequential(first, nn.Tanh(), second)
    lone = nn.Parameter(first.weight.detach().clone())
    optimizer = GaLoreAdamW([{"params": list(tied.parameters()), "rank": RANK}], lr=0.01)
    twin = GaLoreAdamW([{"params": [lone], "rank": RANK}], lr=0.01)
    for x in gradients(16, 12, steps=5):
        optimizer.zero_grad()
        tied(x).square().mean().backward()
        lone.grad = first.weight.grad.clone()
        optimizer.step()
        twin.step()
    assert len(optimizer.state) == 1
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.weight, lone)


def test_a_group_added_late_is_trained_too():
    first, late = weight(20, 12), weight(12, 20)
    optimizer = GaLoreAdamW([ranked(first)])
    follow(optimizer, first, gradients(20, 12, steps=2))
    optimizer.add_param_group(ranked(late))
    alone = weight(12, 20)
    got = follow(optimizer, late, gradients(12, 20))
    wanted = follow(GaLoreAdamW([ranked(alone)]), alone, gradients(12, 20))
    assert torch.equal(torch.stack(got), torch.stack(wanted))


def test_named_parameters_are_taken_as_torch_takes_them():
    layer = nn.Linear(12, 20, bias=False)
    optimizer = GaLoreAdamW(layer.named_parameters(), rank=RANK)
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
    follow(optimizer, layer.weight, gradients(20, 12, steps=1))
    assert basis_of(optimizer, layer.weight).shape == (12, RANK)


# ---- the loop around it ---------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12))


def groups_of(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [
        {"params": matrices, "rank": RANK, "update_proj_gap": 8, "scale": 0.5, "proj_type": "std"},
        {"params": [p for p in model.parameters() if p.dim() == 1]},
    ]


def loss_of(model, x):
    return (model(x) - x.flip(1)).square().mean()


BATCHES = gradients(32, 12, steps=24, seed=7)


def train(optimizer, model, *, clip=None, pieces=1, schedule=None):
    """A usual loop, with or without clipping, accumulation and a schedule; the losses."""
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses = []
    for batch in BATCHES:
        optimizer.zero_grad()
        for piece in batch.chunk(pieces):
            loss = loss_of(model, piece) / pieces
            loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def weights_of(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


LOOPS = {
    "bare": {},
    "clipping": {"clip": 0.1},
    "accumulation": {"pieces": 4},
    "warm-up": {"schedule": lambda t: min(1.0, (t + 1) / 10)},
    "all of them": {"clip": 0.1, "pieces": 2, "schedule": lambda t: 0.9**t},
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_a_usual_training_loop_leads_where_galore_torch_leads(loop):
    ours, theirs = network(), network()
    losses = train(GaLoreAdamW(groups_of(ours), lr=0.01), ours, **loop)
    train(galore_torch.GaLoreAdamW(groups_of(theirs), lr=0.01, no_deprecation_warning=True), theirs, **loop)
    assert largest_difference(weights_of(ours), weights_of(theirs)) <= 1e-6
    assert losses[-1] < losses[0]


def test_accumulated_gradients_give_the_step_of_the_whole_batch():
    whole, pieces = network(), network()
    train(GaLoreAdamW(groups_of(whole), lr=0.01), whole)
    train(GaLoreAdamW(groups_of(pieces), lr=0.01), pieces, pieces=4)
    assert largest_difference(weights_of(whole), weights_of(pieces)) < 1e-5


def test_clipped_gradients_are_what_the_moments_see():
    W = weight(20, 12, dtype=torch.float64)
    optimizer = GaLoreAdamW([ranked(W, rank=12)])
    W.grad = 100 * gradients(20, 12, steps=1, dtype=torch.float64)[0]
    nn.utils.clip_grad_norm_([W], 1.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[W]["exp_avg"].norm().item(), 0.1, rtol=1e-6, atol=0)


def test_a_schedule_scales_the_step_and_the_decay():
    """At a learning rate of 0 nothing moves, decay included; the factor of LambdaLR is the factor of the move."""
    W = weight(20, 12, dtype=torch.float64)
    optimizer = GaLoreAdamW([ranked(W, weight_decay=0.5)], lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: [0.0, 1.0, 0.5][t])
    start = W.detach().clone()
    (G,) = gradients(20, 12, steps=1, dtype=torch.float64)
    (still,) = follow(optimizer, W, [G])
    assert torch.equal(still, start)
    scheduler.step()
    twins = [copy.deepcopy(optimizer) for _ in range(2)]
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.005
    moves = []
    for twin, lr in zip(twins, (0.01, 0.005), strict=True):
        twin.param_groups[0]["lr"], twin.param_groups[0]["weight_decay"] = lr, 0.0
        (p,) = twin.param_groups[0]["params"]
        moves.append(follow(twin, p, [G])[0] - start)
    torch.testing.assert_close(moves[1], 0.5 * moves[0])


def test_a_closure_gives_the_same_step_and_its_loss():
    model, twin = network(), network()
    optimizer, usual = GaLoreAdamW(groups_of(model), lr=0.01), GaLoreAdamW(groups_of(twin), lr=0.01)
    expected = train(usual, twin)
    losses, calls = [], []

    for batch in BATCHES:

        def closure(batch=batch):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append(optimizer.step(closure).item())
    assert calls == [True] * len(BATCHES)
    assert losses == expected
    assert torch.equal(weights_of(model), weights_of(twin))


def test_a_step_without_a_closure_returns_nothing_and_keeps_the_gradients():
    W, (G,) = weight(20, 12), gradients(20, 12, steps=1)
    W.grad = G.clone()
    assert GaLoreAdamW([ranked(W)]).step() is None
    assert torch.equal(W.grad, G)


@by_shape
def test_autocast_around_the_step_changes_nothing(shape):
    results = []
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        W, plain = weight(*shape), weight(30, seed=2)
        optimizer = GaLoreAdamW([ranked(W), {"params": [plain]}], lr=0.01)
        with context:
            plain.grad = gradients(30, steps=1)[0]
            follow(optimizer, W, gradients(*shape))
        results.append((W.detach(), plain.detach()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_closure_still_runs_under_the_autocast_around_the_step():
    W, seen = weight(20, 12), []
    W.grad = gradients(20, 12, steps=1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        GaLoreAdamW([ranked(W)]).step(lambda: seen.append(torch.is_autocast_enabled("cpu")))
    assert seen == [True]


def test_a_gradient_scaler_skips_an_overflow_and_unscales_the_rest():
    W, twin = weight(20, 12), weight(20, 12)
    optimizer, scaler = GaLoreAdamW([ranked(W)], lr=0.01), torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))  # the scale is born lazily
    W.grad = torch.full((20, 12), float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(W, weight(20, 12))
    assert scaler.get_scale() == 32
    sequence = gradients(20, 12)
    for G in sequence:
        W.grad = G * scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
    follow(GaLoreAdamW([ranked(twin)], lr=0.01), twin, sequence)
    assert torch.equal(W, twin)  # a scale of 32 is exact
