"""Leading factors against a whole decomposition; distances from orthonormal; marks."""

import pytest
import torch

from gracile.adapters import factors, gram_defect, svd_factors
from gracile.adapters.factors import marks


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (300, 200), (3, 120, 90)])
@pytest.mark.parametrize("rank", [1, 8, 40])
@pytest.mark.parametrize("exact", [True, False])
def test_the_leading_factors(shape, rank, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(factors, "EXACT_BELOW", 0)
    torch.manual_seed(0)
    scale = 0.9 ** torch.arange(min(shape[-2:]), dtype=torch.float32)
    left, right = (torch.linalg.qr(torch.randn(*shape[:-2], side, len(scale))).Q for side in shape[-2:])
    weight = (left * scale) @ right.mT
    U, S, V = svd_factors(weight, rank)
    assert torch.allclose(S, scale[:rank].expand_as(S), rtol=1e-4)
    for columns in (U, V.mT):
        assert torch.allclose(columns.mT @ columns, torch.eye(rank).expand(*shape[:-2], rank, rank), atol=1e-5)
    best = (left[..., :rank] * scale[:rank]) @ right[..., :rank].mT
    assert torch.allclose((U * S[..., None, :]) @ V, best, atol=1e-4)
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()


def test_the_same_factors_whatever_was_drawn_before(monkeypatch):
    monkeypatch.setattr(factors, "EXACT_BELOW", 0)
    weight = torch.randn(200, 180)
    one = svd_factors(weight, 8, seed=3)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(one, svd_factors(weight, 8, seed=3), strict=True))


def test_the_squared_distance_has_no_gradient_at_orthonormal_columns():
    Q = torch.linalg.qr(torch.randn(40, 8, dtype=torch.float64)).Q.requires_grad_()
    gram_defect(Q).backward()
    assert Q.grad.abs().max() < 1e-12
    moved = (Q.detach() + 0.1 * torch.randn_like(Q)).requires_grad_()
    assert torch.autograd.gradcheck(gram_defect, (moved,))


def test_marks_tell_weights_apart():
    a = torch.randn(20, 10)
    assert torch.equal(marks(a), marks(a.clone()))
    b = a.clone()
    b[3, 4] += 0.5
    assert not torch.allclose(marks(a), marks(b), rtol=1e-2, atol=1e-3)
    assert not torch.allclose(marks(a), marks(a.flip(0)), rtol=1e-2, atol=1e-3)
