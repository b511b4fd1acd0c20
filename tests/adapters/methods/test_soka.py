"""SoKA: sums of Kronecker products, exactly; ranks from the spectrum."""

import pytest
import torch
from adapted import attached, config_of, far, ids, llama
from peft import get_peft_model

from gracile import adapters
from gracile.adapters.methods import soka
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


def moved(dtype=torch.float64, **keys):
    """A model whose products are no longer those that it began with."""
    model = get_peft_model(llama(), config_of("soka", **keys))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.to(dtype)


def plainly(layer, x):
    """W x + s delta x of Kronecker products that are formed one by one."""
    U, S, V, L0, V0 = layer.tensors("default").values()
    change = kronecker_sum(U, S, V) - kronecker_sum(L0, torch.ones(len(S), dtype=x.dtype), V0)
    return x @ layer.base_layer.weight.mT + layer.scale("default") * (x @ change.mT)


@pytest.mark.parametrize("tokens", [1, 3, 300])
@pytest.mark.parametrize("keys", [{}, {"dropout": 0.5}], ids=["with the base", "beside it"])
def test_every_way_has_the_values_and_gradients_of_the_products(tokens, keys):
    for layer in adapters.adapter_layers(moved(**keys).train()):
        layer.dropouts["default"].p = 0.0  # in training, which is not folded, but with nothing dropped
        weight = layer.base_layer.weight.clone()
        names = [getattr(layer, f"soka_{name}")["default"] for name in "USV"]
        x = torch.randn(2, tokens, layer.in_features, dtype=torch.float64, requires_grad=True)
        found, expected = layer(x), plainly(layer, x)
        assert (layer._adapter_to_fold(x) is None) is bool(keys)
        assert far(found, expected) < 1e-12 * float(expected.abs().max())
        dy = torch.randn_like(found)
        own = torch.autograd.grad(found, [x, *names], dy)
        theirs = torch.autograd.grad(expected, [x, *names], dy)
        for a, b in zip(own, theirs, strict=True):
            assert far(a, b) < 1e-12 * float(b.abs().max())
        assert torch.equal(layer.base_layer.weight, weight)


def test_both_ways_are_taken():
    layer = next(adapters.adapter_layers(moved()))
    U, V = layer._products(**layer.tensors("default"))
    for with_base in (True, False):
        assert soka._is_short(1, with_base, U, V)
        assert not soka._is_short(600, with_base, U, V)


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_gradient_of_the_products(tokens):
    U, V = (torch.randn(3, *sides, dtype=torch.float64, requires_grad=True) for sides in ((3, 4), (4, 2)))
    x = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(soka._KroneckerSum.apply, (x, weight, U, V))
    assert torch.autograd.gradcheck(soka._KroneckerSum.apply, (x, None, U, V))


def test_the_base_is_passed_by_itself_where_it_must_be():
    layer = next(adapters.adapter_layers(moved(torch.float32)))
    x, calls = torch.randn(50, layer.in_features), []
    expected = layer(x)
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    assert far(layer(x), expected) < 1e-4
    assert calls == [1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    assert far(y, expected) < 0.05 * float(expected.abs().max())
    y.float().sum().backward()
    assert layer.soka_U["default"].grad.dtype == torch.float32
    two = moved(torch.float32)
    two.add_adapter("second", config_of("soka"))
    two.base_model.set_adapter(["default", "second"])
    two(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in two.parameters() if p.requires_grad)
