"""SST's layer: W stays where it should, and the gradients are those of the paper."""

import pytest
import torch

from gracile.models.layers import SpectralLinear

by_shape = pytest.mark.parametrize(("m", "n", "rank"), [(14, 9, 3), (7, 20, 6), (8, 8, 8)])


def made(m, n, rank, seed=0):
    """A layer whose columns are of length one but no longer orthogonal."""
    torch.manual_seed(seed)
    layer = SpectralLinear(n, m, rank=rank, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for active in (layer.U, layer.V):
            active.div_(lengths(active))
    return layer


def all_of(layer, name):
    frozen = getattr(layer, f"{name}_frozen")
    return getattr(layer, name) if frozen is None else torch.cat([getattr(layer, name), frozen], 1)


def lengths(columns):
    return torch.linalg.vector_norm(columns, dim=0)


@by_shape
def test_gradients_are_the_papers(m, n, rank):
    """Exact for sigma and x; for the active vectors autograd's, without the factor sigma."""
    layer = made(m, n, rank)
    x = torch.randn(2, 5, n, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, m, dtype=torch.float64)
    found = torch.autograd.grad(layer(x), [x, layer.U, layer.V, layer.sigma], dy)
    W = (all_of(layer, "U") * layer.sigma) @ all_of(layer, "V").T
    expected = torch.autograd.grad(x @ W.T + layer.bias, [x, layer.U, layer.V, layer.sigma], dy)
    scales = (1.0, layer.sigma[:rank], layer.sigma[:rank], 1.0)
    for one, other, scale in zip(found, expected, scales, strict=True):
        torch.testing.assert_close(one * scale, other, rtol=1e-10, atol=1e-12)


@by_shape
def test_passes_write_into_nothing_that_they_were_given(m, n, rank):
    """Products are taken in place: not in the layer's tensors, the caller's, or those kept for another backward."""
    layer = made(m, n, rank)
    x, dy = torch.randn(5, n, dtype=torch.float64, requires_grad=True), torch.randn(5, m, dtype=torch.float64)
    held = [x.detach(), dy, *layer.parts().values()]
    before = [tensor.clone() for tensor in held]
    y = layer(x)
    wanted = [x, layer.U, layer.V, layer.sigma]
    first, second = (torch.autograd.grad(y, wanted, dy, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, held, before))


@by_shape
def test_swaps_and_a_new_factorisation_leave_the_weight(m, n, rank):
    layer = made(m, n, rank)
    W, parameters = layer.dense(), list(layer.parameters())
    k = min(m, n)
    before = all_of(layer, "U").detach().clone()
    chosen = torch.randperm(k)[:rank]
    layer.swap(chosen)
    assert torch.equal(layer.U.detach(), before[:, chosen])
    torch.testing.assert_close(layer.dense(), W, rtol=1e-12, atol=1e-12)
    layer.refactor()
    torch.testing.assert_close(layer.dense(), W, rtol=1e-10, atol=1e-10)
    for columns in (all_of(layer, "U"), all_of(layer, "V")):
        torch.testing.assert_close(columns.T @ columns, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    assert (layer.sigma[1:] <= layer.sigma[:-1]).all()
    assert all(one is other for one, other in zip(parameters, layer.parameters(), strict=True))


def test_what_is_drawn_next_is_half_even_and_half_by_size():
    layer = made(8, 8, 2)
    with torch.no_grad():
        layer.sigma.copy_(torch.tensor([7.0, 1, 0, 0, 0, 0, 0, 0]))
    expected = 0.5 * (torch.full((8,), 1 / 8) + torch.tensor([7.0, 1, 0, 0, 0, 0, 0, 0]) / 8)
    torch.testing.assert_close(layer.probabilities(), expected)
    with torch.no_grad():
        layer.sigma.zero_()
    torch.testing.assert_close(layer.probabilities(), torch.full((8,), 1 / 8))


@pytest.mark.parametrize("chosen", [[0, 0], [1], [1, 2, 3]])
def test_other_choices_are_refused(chosen):
    with pytest.raises(ValueError, match="chosen must be 2 different numbers below 8"):
        made(8, 9, 2).swap(torch.tensor(chosen))


def test_all_vectors_may_be_active():
    layer = made(6, 9, 6)
    assert layer.U_frozen is None
    assert layer.V_frozen is None
    layer(torch.randn(3, 9, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("rank", [0, 7, 1.5])
def test_a_rank_that_cannot_be(rank):
    with pytest.raises(ValueError, match="rank must be a whole number from 1 to 6 here"):
        SpectralLinear(9, 6, rank=rank)
