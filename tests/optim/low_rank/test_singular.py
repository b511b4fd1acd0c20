"""Warm-started orthogonal iteration against the exact leading subspace."""

import pytest
import torch
from torch import nn

from gracile.optim import GaLoreAdamW
from gracile.optim.distributed.projection import ProjectionSide
from gracile.optim.low_rank.singular import (
    leading_singular_vectors,
    orthogonal_iteration,
    orthonormalized,
    random_columns,
)

SHAPES = [(80, 48), (48, 80), (64, 64)]
RANK = 8


def decaying(m, n, seed=0, power=1.0, dtype=torch.float32):
    """A gradient-like matrix: singular values fall as 1 / i^power."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return ((U * torch.arange(1, k + 1) ** -power) @ V.t()).to(dtype)


def energy(G, columns, right):
    return torch.linalg.vector_norm((G @ columns if right else columns.t() @ G).double()) ** 2


@pytest.fixture(params=SHAPES, ids=["tall", "wide", "square"])
def shape(request):
    return request.param


@pytest.fixture(params=["left", "right"])
def frame(request, shape):
    return ProjectionSide.of(shape, RANK, request.param)


def test_a_cold_start_holds_nearly_all_the_energy_that_can_be_held(shape, frame):
    G = decaying(*shape)
    best = energy(G, leading_singular_vectors(G, frame), frame.right)
    assert energy(G, orthogonal_iteration(G, frame, None), frame.right) >= 0.99 * best


def test_one_warm_iteration_follows_a_gradient_that_drifts(shape, frame):
    Q = orthogonal_iteration(decaying(*shape), frame, None)
    for step in range(1, 6):
        G = decaying(*shape) + 0.05 * step * decaying(*shape, seed=1)
        Q = orthogonal_iteration(G, frame, Q)
        best = energy(G, leading_singular_vectors(G, frame), frame.right)
        assert energy(G, Q, frame.right) >= 0.98 * best  # the spectrum falls slowly, and a quarter of it turns


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_columns_are_orthonormal_and_repeatable(shape, frame, dtype, bound):
    G = decaying(*shape, dtype=dtype)
    Q = orthogonal_iteration(G, frame, None)
    assert Q.dtype == dtype
    assert (Q.t() @ Q - torch.eye(RANK)).abs().max() <= bound
    assert torch.equal(Q, orthogonal_iteration(G.clone(), frame, None))


def test_a_subspace_that_is_already_leading_is_not_turned(shape, frame):
    """Coordinates keep their meaning: no sign flips, no reordering."""
    G = decaying(*shape, dtype=torch.float64)
    exact = leading_singular_vectors(G, frame)
    torch.testing.assert_close(orthogonal_iteration(G, frame, exact), exact, rtol=0, atol=1e-8)


def test_a_gradient_of_few_directions_keeps_the_old_ones_beside_them(shape, frame):
    G = decaying(*shape, dtype=torch.float64)
    old = orthogonal_iteration(G, frame, None)
    assert torch.allclose(orthogonal_iteration(torch.zeros_like(G), frame, old), old, atol=1e-12)
    u, v = torch.randn(shape[0], dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)
    Q = orthogonal_iteration(torch.outer(u, v), frame, old)
    assert (Q.t() @ Q - torch.eye(RANK)).abs().max() < 1e-12
    direction = v / v.norm() if frame.right else u / u.norm()
    assert (direction - Q @ (Q.t() @ direction)).norm() < 1e-6


@pytest.mark.parametrize("noise", [0, 1e-6, 1e-3])
@pytest.mark.parametrize(("side", "rank"), [(256, 128), (1024, 512)])
def test_columns_of_one_direction_are_filled_up_also_where_they_are_many(side, rank, noise):
    """Their Gram matrix has eigenvalues of a rounding, and some below zero: more so where they are more."""
    previous = random_columns((side, rank), 0, torch.empty(0))
    generator = torch.Generator().manual_seed(1)
    columns = torch.outer(torch.randn(side, generator=generator), torch.randn(rank, generator=generator))
    columns += noise * torch.randn(side, rank, generator=generator)
    Q = orthonormalized(columns, previous)
    assert (Q.t() @ Q - torch.eye(rank)).abs().max() < 1e-5


def test_a_run_with_iterate_follows_the_iteration_and_one_with_svd_does_not():
    W = {name: nn.Parameter(decaying(80, 48)) for name in ("svd", "iterate")}
    frame = ProjectionSide.of((80, 48), RANK, "std")
    expected = None
    optimizers = {name: GaLoreAdamW([p], rank=RANK, update_proj_gap=2, subspace_method=name) for name, p in W.items()}
    for step in range(6):
        G = decaying(80, 48) + 0.1 * decaying(80, 48, seed=step)
        for name, p in W.items():
            p.grad = G.clone()
            optimizers[name].step()
        if step % 2 == 0:
            expected = orthogonal_iteration(G, frame, expected)
    torch.testing.assert_close(optimizers["iterate"].state[W["iterate"]]["basis"], expected, rtol=0, atol=1e-5)
    assert (optimizers["svd"].state[W["svd"]]["basis"] - expected).abs().max() > 1e-2


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="subspace_method must be one of svd, iterate, got 'qr'"):
        GaLoreAdamW([nn.Parameter(decaying(8, 4))], rank=2, subspace_method="qr")


@pytest.mark.parametrize("proj_type", ["right", "left"])
def test_a_constant_gradient_leaves_no_basis_that_blows_up(proj_type):
    """Its columns are one to the last bit; what rounding makes of them had entries of 1e13."""
    W = nn.Parameter(torch.zeros(512, 512))
    optimizer = GaLoreAdamW([W], lr=0.01, rank=16, proj_type=proj_type, update_proj_gap=1)
    for t in range(8):
        along = optimizer.state[W]["basis"][:, t] if t % 2 else torch.ones(512)
        G = torch.outer(torch.ones(512), along) * 1e-3
        W.grad = (G if proj_type == "right" else G.t()).contiguous()
        optimizer.step()
        assert optimizer.state[W]["basis"].abs().max() <= 1.01
        assert W.abs().max() < 1
