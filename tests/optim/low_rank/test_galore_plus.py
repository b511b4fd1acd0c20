"""GaLore+: GaLore when switched off, the shared head, the randomized subspace, the sparse residual, saving."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from gracile import optim
from gracile.optim import GaLorePlusAdamW
from gracile.optim.distributed.projection import ProjectionSide
from gracile.optim.low_rank.singular import leading_singular_vectors, randomized_range
from gracile.optim.low_rank.sparse_residual import absorb_, first_support

# the authors' exact singular vectors; the default is one cheap iteration
GaLoreAdamW = partial(optim.GaLoreAdamW, subspace_method="svd")

SHAPES = [(40, 24), (24, 40), (32, 32)]
RANK = 6

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide", "square"])
by_side = pytest.mark.parametrize("side", ["left", "right"])


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def weight(*shape, dtype=torch.float32):
    return nn.Parameter(0.02 * normal(*shape, dtype=dtype))


def gradients(*shape, steps=16, dtype=torch.float32):
    return [(1 + t % 3) * normal(*shape, seed=1 + t, dtype=dtype) for t in range(steps)]


def dominated(m, n, q, steps=16):
    """A strong direction and, in every row, q entries that stand out of what it misses."""
    places = normal(m, n, seed=50).topk(q, dim=1).indices
    strong = 20 * torch.outer(normal(m, seed=51).sign(), normal(n, seed=52).sign())
    for t in range(steps):
        sparse = torch.zeros(m, n).scatter_(1, places, (5 + 0.1 * normal(m, q, seed=60 + t)) * (-1) ** t)
        yield strong * (1 + t % 2) + sparse + 0.1 * normal(m, n, seed=80 + t)


def moved(optimizer, parameter, G):
    before = parameter.detach().clone()
    parameter.grad = G.clone()
    optimizer.step()
    return before - parameter.detach()


def projector(columns):
    return (columns @ columns.mT).double()


def right_space(G, rank):
    return projector(torch.linalg.svd(G, full_matrices=False).Vh[:rank].mT)


def decaying(m, n, dtype=torch.float64):
    """Singular values 1, 1/2, 1/3, ..."""
    k = min(m, n)
    U, V = (torch.linalg.qr(normal(side, k, seed=side + 7, dtype=torch.float64)).Q for side in (m, n))
    return ((U / torch.arange(1, k + 1)) @ V.t()).to(dtype)


def missed_by(G, P, right):
    return G - G @ P @ P.t() if right else G - P @ (P.t() @ G)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 12), (12, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_head_exact_vectors_and_no_residual_are_galore_on_the_right(shape, dtype):
    W, V = weight(*shape, dtype=dtype), weight(*shape, dtype=dtype)
    keys = {"rank": RANK, "update_proj_gap": 5, "lr": 0.01, "weight_decay": 0.1, "scale": 0.3}
    plus = GaLorePlusAdamW([W], num_heads=1, subspace_method="svd", residual_fraction=0, **keys)
    plain = GaLoreAdamW([V], proj_type="right", **keys)
    for G in gradients(*shape, dtype=dtype):
        moved(plus, W, G)
        moved(plain, V, G)
        assert torch.equal(W, V)
    assert plus.state[W].keys() == plain.state[V].keys()
    assert all(torch.equal(value, plain.state[V][key]) for key, value in plus.state[W].items())


@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize("shape", [(40, 24), (40, 50), (40, 40)])
def test_the_subspace_is_that_of_one_head_and_projects_them_all(method, shape):
    """A dense history in fp64; the heads have rank 4, so that both methods find all of one and nothing else."""
    heads, rank = 5, 4
    W = weight(*shape, dtype=torch.float64)
    keys = {"rank": rank, "update_proj_gap": 5, "lr": 0.01, "scale": 0.5, "eps": 1e-3}
    optimizer = GaLorePlusAdamW([W], num_heads=heads, subspace_method=method, residual_fraction=0, **keys)
    M, V, chosen = 0, 0, []
    for t, noise in enumerate(gradients(shape[0], rank, dtype=torch.float64), start=1):
        inputs = [normal(rank, shape[1], seed=100 * t + i, dtype=torch.float64) for i in range(heads)]
        parts = [rows @ given for rows, given in zip(noise.chunk(heads), inputs, strict=True)]
        G = torch.cat(parts)
        U = moved(optimizer, W, G)
        P = optimizer.state[W]["basis"]
        if (t - 1) % 5 == 0:
            near = [(projector(P) - right_space(part, rank)).abs().max() < 1e-7 for part in parts]
            assert sum(near) == 1
            chosen.append(near.index(True))
        R = G @ P
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R**2
        N = M / (V.sqrt() + 1e-3) * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        torch.testing.assert_close(U, 0.005 * N @ P.t(), rtol=0, atol=1e-12)
    assert len(set(chosen)) > 1


def heads_drawn(seed, steps=400, matrices=2):
    """The head at each step, for each matrix: all rows of head i are the unit vector i."""
    torch.manual_seed(seed + steps)  # of no consequence
    held = [weight(10, 8) for _ in range(matrices)]
    keys = {"rank": 1, "update_proj_gap": 1, "subspace_method": "svd", "residual_fraction": 0}
    optimizer = GaLorePlusAdamW(held, num_heads=5, seed=seed, **keys)
    drawn = []
    for _ in range(steps):
        for p in held:
            p.grad = torch.eye(5, 8).repeat_interleave(2, dim=0)
        optimizer.step()
        drawn.append([optimizer.state[p]["basis"].abs().argmax().item() for p in held])
    return list(zip(*drawn, strict=True))


def test_heads_are_drawn_evenly_from_the_seed_and_the_position_alone():
    first, second = heads_drawn(0)
    for drawn in (first, second):
        assert all(50 <= drawn.count(head) <= 110 for head in range(5))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 140  # 80 by chance
    assert heads_drawn(0, steps=50, matrices=1)[0] == first[:50]
    assert heads_drawn(1, steps=50, matrices=1)[0] != first[:50]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_equal_heads_give_the_right_space_of_the_whole(shape):
    heads = 4
    G = normal(shape[0] // heads, shape[1], dtype=torch.float64).repeat(heads, 1)
    for method in ("svd", "randomized"):
        W = weight(*shape, dtype=torch.float64)
        keys = {"rank": RANK, "subspace_method": method, "power_iterations": 60}
        optimizer = GaLorePlusAdamW([W], num_heads=heads, **keys)
        moved(optimizer, W, G)
        assert (projector(optimizer.state[W]["basis"]) - right_space(G, RANK)).abs().max() < 1e-8


def test_grouped_queries_cap_the_rank_at_a_heads_rows_and_keep_layers_apart():
    """32 query rows and 8 key rows over 24 inputs, heads of 4."""
    queries, keys = weight(32, 24), weight(8, 24)
    groups = [{"params": [queries], "num_heads": 8}, {"params": [keys], "num_heads": 2}]
    optimizer = GaLorePlusAdamW([{**group, "rank": 16} for group in groups], residual_fraction=0)
    for p in (queries, keys):
        p.grad = normal(*p.shape, seed=p.shape[0])
    optimizer.step()
    for p, heads in ((queries, 8), (keys, 2)):
        P = optimizer.state[p]["basis"]
        assert P.shape == (24, 4)
        assert optimizer.state[p]["exp_avg"].shape == (p.shape[0], 4)
        assert sum((projector(P) - right_space(part, 4)).abs().max() < 1e-5 for part in p.grad.chunk(heads)) == 1


def test_heads_that_do_not_divide_the_rows_are_refused_and_nothing_is_added():
    optimizer = GaLorePlusAdamW([weight(12, 8)], rank=2, num_heads=4)
    with pytest.raises(ValueError, match="num_heads must divide the rows of each matrix, here 10, got 4"):
        optimizer.add_param_group({"params": [weight(16, 8), weight(10, 8)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [weight(10, 8)], "rank": None})  # nobody looks at its heads
    optimizer.add_param_group({"params": [weight(10, 8)], "num_heads": 5})


@by_shape
@by_side
@pytest.mark.parametrize("warm", [False, True])
def test_a_matrix_of_low_rank_is_reconstructed(shape, side, warm):
    frame = ProjectionSide.of(shape, RANK, side)
    G = normal(shape[0], RANK, seed=1) @ normal(RANK, shape[1], seed=2)
    stale = torch.linalg.qr(normal(*frame.basis_shape, seed=3)).Q if warm else None
    P = randomized_range(G, frame, stale, seed=4)
    assert missed_by(G, P, frame.right).norm() < 1e-5 * G.norm()
    assert (P.t() @ P - torch.eye(RANK)).abs().max() < 1e-5


@by_shape
@by_side
@pytest.mark.parametrize("warm", [False, True])
def test_principal_angles_to_the_exact_space_fall_with_every_iteration(shape, side, warm):
    frame, G = ProjectionSide.of(shape, RANK, side), decaying(*shape)
    exact = leading_singular_vectors(G, frame)
    stale = torch.linalg.qr(normal(*frame.basis_shape, seed=3, dtype=torch.float64)).Q if warm else None
    angles = []
    for iterations in range(7):
        P = randomized_range(G, frame, stale, seed=4, oversampling=4, iterations=iterations)
        angles.append(torch.linalg.matrix_norm(exact - P @ (P.t() @ exact), 2).item())  # the largest one's sine
        sizes = (G @ P if frame.right else G.t() @ P).norm(dim=0)
        assert (sizes.diff() <= 1e-12).all()  # in order
    assert all(after < 0.95 * before for before, after in pairwise(angles))
    assert angles[6] < 0.02 < 0.2 < angles[0]


@by_side
def test_the_previous_subspace_and_the_seed_are_where_the_iteration_starts(side):
    frame, G = ProjectionSide.of((40, 24), RANK, side), decaying(40, 24)
    exact = leading_singular_vectors(G, frame)
    once = {"oversampling": 2, "iterations": 1}
    warm, cold = (randomized_range(G, frame, start, seed=4, **once) for start in (exact, None))
    assert (projector(warm) - projector(exact)).abs().max() < 1e-10
    assert (projector(cold) - projector(exact)).abs().max() > 1e-3
    torch.manual_seed(2)
    assert torch.equal(cold, randomized_range(G.clone(), frame, None, seed=4, **once))
    assert not torch.equal(cold, randomized_range(G, frame, None, seed=5, **once))


@by_side
def test_the_largest_entry_of_each_column_is_positive(side):
    """Eigenvectors have any sign, and not the same one on every machine."""
    frame = ProjectionSide.of((40, 24), RANK, side)
    for seed in range(4):
        P = randomized_range(normal(40, 24, seed=seed), frame, None, seed=seed)
        assert (P.gather(0, P.abs().argmax(dim=0, keepdim=True)) > 0).all()


@by_side
def test_an_all_zero_gradient_keeps_the_previous_columns_to_the_bit(side):
    frame = ProjectionSide.of((40, 24), RANK, side)
    previous = torch.linalg.qr(normal(*frame.basis_shape)).Q
    assert torch.equal(randomized_range(torch.zeros(40, 24), frame, previous, seed=0), previous)
    first = randomized_range(torch.zeros(40, 24), frame, None, seed=0)
    assert (first.t() @ first - torch.eye(RANK)).abs().max() < 1e-6


@by_side
def test_a_gradient_of_zeros_or_not_finite_keeps_the_old_basis_in_the_optimizer(side):
    W = weight(40, 24)
    optimizer = GaLorePlusAdamW([W], rank=RANK, update_proj_gap=2, proj_type=side)
    first, second, third = gradients(40, 24, steps=3)
    moved(optimizer, W, first)
    moved(optimizer, W, second)
    before = optimizer.state[W]["basis"].clone()
    moved(optimizer, W, torch.zeros(40, 24))
    assert torch.equal(optimizer.state[W]["basis"], before)
    moved(optimizer, W, second)
    third[3, 5] = math.nan
    with pytest.warns(UserWarning, match="not finite"):
        moved(optimizer, W, third)
    assert torch.equal(optimizer.state[W]["basis"], before)


@pytest.mark.parametrize(("n", "q"), [(12, 2), (12, 7), (12, 12), (1, 1)])
def test_a_support_is_the_candidates_of_a_slow_loop(n, q):
    """Random scores: candidates lose their place and their sum, and come back with one score."""
    rows = 5
    support, totals = first_support(rows, q, torch.device("cpu")), torch.zeros(rows, q)
    slow = [dict.fromkeys(range(q), 0.0) for _ in range(rows)]
    for t in range(12):
        scores = normal(rows, n, seed=t).abs() ** 3
        absorb_(support, totals, scores.clone())
        for i, row in enumerate(scores.tolist()):
            held = {j: total + row[j] for j, total in slow[i].items()}
            others = sorted((j for j in range(n) if j not in held), key=lambda j: -row[j])[:q]
            held |= {j: row[j] for j in others}
            slow[i] = dict(sorted(held.items(), key=lambda item: -item[1])[:q])
            got = dict(zip(support[i].tolist(), totals[i].tolist(), strict=True))
            assert got == pytest.approx(slow[i], rel=1e-5)


@pytest.mark.parametrize(("fraction", "columns", "places"), [(0.07, 100, 7), (0.29, 100, 29), (0.01, 30, 1)])
def test_a_fraction_of_a_line_is_rounded_up_but_not_by_an_error_of_rounding(fraction, columns, places):
    W = nn.Parameter(torch.ones(columns, columns))
    W.grad = torch.ones_like(W)
    optimizer = GaLorePlusAdamW([W], rank=2, residual_fraction=fraction)
    optimizer.step()
    assert optimizer.state[W]["residual_places"].shape == (columns, places)


@by_shape
def test_the_support_is_the_brute_force_top_q_where_the_same_places_dominate(shape):
    m, n = shape
    right = m >= n
    lines, entries = (m, n) if right else (n, m)
    q, warmup = math.ceil(0.07 * entries), 6
    W = weight(m, n)
    keys = {"rank": 1, "update_proj_gap": 4, "residual_fraction": 0.07, "residual_warmup": warmup}
    optimizer = GaLorePlusAdamW([W], **keys)
    total, found = torch.zeros(lines, entries), None
    for t, lined in enumerate(dominated(lines, entries, q), start=1):
        G = lined if right else lined.t()
        moved(optimizer, W, G)
        state = optimizer.state[W]
        support = state["residual_places"]
        assert (support.dtype, support.shape) == (torch.int32, (lines, q))
        assert all(len(set(row)) == q for row in support.tolist())
        if t > warmup:
            assert torch.equal(support, found)
            continue
        E = missed_by(G, state["basis"], right).abs()
        E = E if right else E.t()
        total += E
        expected = total.topk(q, dim=1).indices.sort(dim=1).values
        assert torch.equal(E.topk(q, dim=1).indices.sort(dim=1).values, expected)  # the premise
        assert torch.equal(support.long().sort(dim=1).values, expected)
        scores = total.gather(1, support.long()) if t < warmup else torch.zeros(lines, q)  # then moments
        torch.testing.assert_close(state["residual_exp_avg"], scores)
        found = support.clone()
    assert (found.diff(dim=1) > 0).all()  # sorted


@by_shape
@pytest.mark.parametrize("scale", [0.25, 0.3])
def test_entries_of_the_support_gain_dense_adam_of_its_own_age_and_others_nothing(oracle, shape, scale):
    """In fp64, over refreshes at 5 and 10: moments of entries stay when the subspace turns. Others keep every bit."""
    W, V = weight(*shape, dtype=torch.float64), weight(*shape, dtype=torch.float64)
    keys = {"rank": RANK, "update_proj_gap": 5, "lr": 0.01, "scale": scale, "betas": (0.8, 0.97), "eps": 1e-3}
    plus = GaLorePlusAdamW([W], residual_fraction=0.15, residual_warmup=3, **keys)
    plain = GaLorePlusAdamW([V], residual_fraction=0, **keys)
    history, inside = [], torch.zeros(shape, dtype=torch.bool)
    for t, G in enumerate(gradients(*shape, dtype=torch.float64), start=1):
        gained = moved(plus, W, G) - moved(plain, V, G)
        expected = torch.zeros_like(G)
        if t > 3:
            state = plus.state[W]
            places, right = state["residual_places"].long(), shape[0] >= shape[1]
            lined = {name: X if right else X.t() for name, X in (("inside", inside), ("expected", expected))}
            lined["inside"].scatter_(1, places, True)
            E = missed_by(G, state["basis"], right)
            history.append((E if right else E.t()).gather(1, places))
            lined["expected"].scatter_(1, places, 0.01 * scale * oracle.adam_direction(history, (0.8, 0.97), 1e-3))
        torch.testing.assert_close(gained, expected, rtol=0, atol=1e-12)
        assert torch.equal(W[~inside], V[~inside])


@by_shape
def test_a_fraction_of_one_captures_everything(shape):
    """Without memory the moments are R and E, and together they are G; the update's sparse part is sign(E)."""
    W = weight(*shape, dtype=torch.float64)
    keys = {"rank": RANK, "update_proj_gap": 3, "lr": 1.0, "scale": 1.0, "betas": (0.0, 0.0), "eps": 0.0}
    optimizer = GaLorePlusAdamW([W], residual_fraction=1, residual_warmup=1, **keys)
    right = shape[0] >= shape[1]
    for t, G in enumerate(gradients(*shape, steps=8, dtype=torch.float64)):
        U, state = moved(optimizer, W, G), optimizer.state[W]
        P, R, E = state["basis"], state["exp_avg"], state["residual_exp_avg"]
        E = E if right else E.t()
        inside, sign = (R @ P.t(), R.sign() @ P.t()) if right else (P @ R, P @ R.sign())
        if t > 0:
            torch.testing.assert_close(inside + E, G, rtol=0, atol=1e-12)
            torch.testing.assert_close(U - sign, E.sign(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("saved_after", [4, 10], ids=["in the warm-up", "after it"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_run_continues_to_the_bit(saved_after, dtype, tmp_path):
    shape = (40, 24)
    keys = {"rank": RANK, "update_proj_gap": 5, "num_heads": 4, "residual_fraction": 0.1, "residual_warmup": 7}
    W = weight(*shape, dtype=dtype)
    one = GaLorePlusAdamW([W], **keys)
    given = gradients(*shape, dtype=dtype)
    for G in given[:saved_after]:
        moved(one, W, G)
    torch.save(one.state_dict(), tmp_path / "optimizer.pt")
    V = nn.Parameter(W.detach().clone())
    other = GaLorePlusAdamW([V], **keys)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for G in given[saved_after:]:
        moved(one, W, G)
        moved(other, V, G)
        assert torch.equal(W, V)
        assert all(torch.equal(v, other.state[V][k]) for k, v in one.state[W].items())
    assert torch.isfinite(W).all()
    state = other.state[V]
    assert (state["residual_places"].dtype, state["residual_exp_avg"].dtype) == (torch.int32, torch.float32)
    assert all(state[key].shape == (40, 3) for key in state if key.startswith("residual"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_heads": 0}, ["num_heads", "0"]),
        ({"num_heads": 2, "proj_type": "left"}, ["proj_type", "'left'", "num_heads"]),
        ({"residual_fraction": 1.1}, ["residual_fraction", "1.1"]),
        ({"residual_warmup": 0}, ["residual_warmup", "0"]),
        ({"power_iterations": 0.5}, ["power_iterations", "0.5"]),
        ({"subspace_method": "qr"}, ["randomized, svd, iterate", "'qr'"]),
    ],
)
def test_bad_values_are_refused(keys, words):
    with pytest.raises(ValueError) as error:
        GaLorePlusAdamW([weight(4, 4)], rank=2, **keys)
    assert all(word in str(error.value) for word in words)
