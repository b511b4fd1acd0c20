"""SoKA: sums of Kronecker products, exactly; ranks from the spectrum."""

import pytest
import torch
from adapted import attached, far

from gracile import adapters
from gracile.adapters.methods.soka import divided, elbow, held_by, rearranged


def kronecker_sum(U, S, V):
    return sum(s * torch.kron(u, v) for u, s, v in zip(U, S, V, strict=True))


@pytest.mark.parametrize(("side", "parts"), [(64, (8, 8)), (128, (8, 16)), (7, (1, 7)), (1, (1, 1)), (4096, (64, 64))])
def test_sides_are_divided_near_their_roots(side, parts):
    assert divided(side) == parts


@pytest.mark.parametrize(("m", "n"), [(12, 20), (7, 15), (16, 16)])
def test_the_weight_is_a_sum_of_kronecker_products(m, n):
    weight = torch.randn(m, n, dtype=torch.float64)
    (m1, m2), (n1, n2) = divided(m), divided(n)
    U, S, V = torch.linalg.svd(rearranged(weight), full_matrices=False)
    left, right = U.mT.reshape(-1, m1, n1), V.reshape(-1, m2, n2)
    assert far(kronecker_sum(left, S, right), weight) < 1e-12
    cut = kronecker_sum(left[:2], S[:2], right[:2])
    assert abs((weight - cut).norm() - S[2:].norm()) < 1e-12


def test_the_change_is_that_of_the_products():
    for layer in adapters.adapter_layers(attached("soka")):
        with torch.no_grad():
            for name in "USV":
                p = getattr(layer, f"soka_{name}")["default"]
                p.add_(0.1 * torch.randn_like(p))
        U, S, V = (getattr(layer, f"soka_{name}")["default"] for name in "USV")
        L0, V0 = layer.soka_L0["default"], layer.soka_V0["default"]
        expected = kronecker_sum(U, S, V) - kronecker_sum(L0, torch.ones(4), V0)
        assert far(layer.get_delta_weight("default"), layer.scale("default") * expected) < 1e-4


def test_ranks_from_the_spectrum():
    S = torch.tensor([4.0, 2.0, 1.0, 0.5])
    assert held_by(S, 0.75 * S.square().sum()) == 1
    assert held_by(S, 0.99 * S.square().sum()) == 4
    assert held_by(S, 2 * S.square().sum()) == 4
    assert elbow(torch.tensor([8.0, 7.9, 7.8, 0.1, 0.09, 0.08])) in (2, 3)
    assert elbow(torch.tensor([1.0])) == 1
    model = attached("soka", r=30, energy=0.5)
    for layer in adapters.adapter_layers(model):
        squares = torch.linalg.svdvals(rearranged(layer.base_layer.weight)).square()
        rank = len(layer.soka_S["default"])
        assert squares[:rank].sum() >= 0.5 * squares.sum()
        assert rank == 30 or squares[: rank - 1].sum() < 0.5 * squares.sum()
