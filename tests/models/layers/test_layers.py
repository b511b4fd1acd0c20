"""Every layer that stores less: merged it computes the same, and its gradients are those of the dense expression."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.models.layers import (
    DopedLinear,
    FactoredLinear,
    FactorisedLinear,
    LowRankLinear,
    NMLinear,
    OrderedLowRankLinear,
    ReLoRALinear,
    ScaledLinear,
    SparseLowRankLinear,
    SpectralLinear,
    ThresholdLinear,
)


class Kind(NamedTuple):
    cls: type[FactoredLinear]
    keys: dict
    trained: object  # how many numbers of an m x n layer
    keeps_weight: bool = False


def sltrain_numbers(m, n):
    return 3 * (m + n) + int(0.2 * m * n)


def rank_of_factors(m, n):
    return 8 * math.ceil(m * n / (0.5 * (m + n)) / 8)


LAYERS = {
    "low rank": Kind(LowRankLinear, {"rank": 3}, lambda m, n: 3 * (m + n)),
    "sltrain": Kind(SparseLowRankLinear, {"rank": 3, "alpha": 2.0, "density": 0.2}, sltrain_numbers),
    "sst": Kind(SpectralLinear, {"rank": 3}, lambda m, n: 3 * (m + n) + min(m, n), True),
    "relora": Kind(ReLoRALinear, {"rank": 3, "alpha": 2.0}, lambda m, n: 3 * (m + n), True),
    "maestro": Kind(OrderedLowRankLinear, {"rank": 5}, lambda m, n: 5 * (m + n), True),
    "factorised": Kind(FactorisedLinear, {"sparsity": 0.5}, lambda m, n: rank_of_factors(m, n) * (m + n)),
    "doped": Kind(DopedLinear, {"sparsity": 0.75}, lambda m, n: m * n + int(0.75 * m * n / (m + n)) * (m + n)),
    "autosparse": Kind(ThresholdLinear, {}, lambda m, n: m * n + 1, True),
    "autosparse at a budget": Kind(ThresholdLinear, {"sparsity": 0.25}, lambda m, n: m * n),
}
by_layer = pytest.mark.parametrize("kind", LAYERS.values(), ids=LAYERS)
by_shape = pytest.mark.parametrize(("m", "n"), [(11, 7), (6, 17), (8, 8)])
by_bias = pytest.mark.parametrize("bias", [True, False])


def made(kind, m, n, bias=True, dtype=torch.float32, seed=0):
    """A layer none of whose parameters is zero."""
    torch.manual_seed(seed)
    layer = kind.cls(n, m, bias, dtype=dtype, **kind.keys)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


@by_layer
@by_shape
@by_bias
def test_merged_it_computes_the_same(kind, m, n, bias):
    layer = made(kind, m, n, bias).eval()
    plain = layer.merge()
    assert type(plain) is nn.Linear
    assert (plain.bias is not None) == bias
    assert not plain.training
    for shape in ((5, n), (2, 3, n), (n,)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(plain.weight, layer.dense())
    assert not layer.dense().requires_grad


def enhanced(layer, name):
    """SST's vectors have another gradient, on purpose."""
    return isinstance(layer, SpectralLinear) and name in ("U", "V")


@by_layer
@by_shape
@by_bias
def test_gradients_in_fp64(kind, m, n, bias):
    layer = made(kind, m, n, bias, torch.float64)
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    exact = {k: p for k, p in layer.named_parameters() if p.requires_grad and not enhanced(layer, k)}
    names, values = zip(*exact.items(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


MASKED = {
    "n:m": Kind(NMLinear, {}, None),
    "n:m, scaled": Kind(NMLinear, {"flow": "scaled"}, None),
    "cast": Kind(ScaledLinear, {}, None),
}


@pytest.mark.parametrize("kind", [*LAYERS.values(), *MASKED.values()], ids=[*LAYERS, *MASKED])
@pytest.mark.parametrize(("m", "n"), [(12, 8), (7, 16)])
@pytest.mark.parametrize("changed", [False, True])
def test_through_its_weight_the_gradients_are_those_of_a_pass(kind, m, n, changed):
    """SST's own, too, and while a schedule has changed the layer. Experts in one tensor are read so."""
    layer = made(kind, m, n, False, torch.float64)
    if changed:
        getattr(layer, "annealed", torch.empty(1)).fill_(0.25)
        layer.residue, layer.sampled = 0.5, 2
    G = torch.randn(m, n, dtype=torch.float64)
    found = []
    for W in (layer.trained_weight(), layer(torch.eye(n, dtype=torch.float64)).mT):
        layer.zero_grad()
        W.backward(G)
        found.append([W.detach(), *(p.grad for p in layer.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@by_layer
def test_frozen_parts_get_no_gradient(kind):
    layer = made(kind, 6, 5)
    first, *others = (p for p in layer.parameters() if p.requires_grad)
    first.requires_grad_(False)
    layer(torch.randn(4, 5)).sum().backward()
    assert first.grad is None
    assert all(p.grad is not None for p in others)


@by_layer
@by_shape
def test_it_holds_no_more_than_it_should(kind, m, n):
    layer = kind.cls(n, m, True, **kind.keys)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == kind.trained(m, n) + m


@by_layer
def test_nothing_of_the_weights_size_is_saved_between_the_passes(kind):
    """But parameters and what the layer keeps anyway: views of them cost nothing."""
    layer = made(kind, 40, 50)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    saved = []

    def keep(tensor):
        saved.append(0 if tensor.untyped_storage().data_ptr() in own else tensor.untyped_storage().nbytes() // 4)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(4, 50)).sum()
    assert 0 < max(saved) <= 4 * 50


def full_rank(kind, linear):
    """The weight, or the nearest of the layer's rank (Eckart and Young)."""
    if kind.cls is not OrderedLowRankLinear:
        return linear.weight
    U, sigma, Vh = torch.linalg.svd(linear.weight.double(), full_matrices=False)
    return ((U[:, :5] * sigma[:5]) @ Vh[:5]).bfloat16()


@by_layer
def test_it_takes_the_place_of_a_linear_layer(kind):
    linear = nn.Linear(20, 12, dtype=torch.bfloat16).eval()
    layer = kind.cls.from_linear(linear, **kind.keys)
    assert (layer.in_features, layer.out_features, layer.training) == (20, 12, False)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert torch.equal(layer.bias, linear.bias)
    assert kind.keeps_weight == torch.allclose(layer.dense(), full_rank(kind, linear), rtol=0.02, atol=0.01)
    assert layer.merge().weight.dtype == torch.bfloat16
    with torch.device("meta"):
        empty = kind.cls.from_linear(nn.Linear(20, 12, bias=False), **kind.keys)
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
    assert empty.bias is None


@by_layer
def test_it_says_what_it_is(kind):
    told = repr(made(kind, 6, 5))
    own = "".join(f", {key}={value:g}" for key, value in list(kind.keys.items())[:1])
    assert f"{kind.cls.__name__}(in_features=5, out_features=6, bias=True{own}" in told


@by_layer
def test_autocast_checkpointing_copies_and_compilation(kind):
    layer = made(kind, 16, 12)
    x = torch.randn(8, 12, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    plain = torch.autograd.grad(layer(x).square().sum(), trained)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert_all_close(torch.autograd.grad(again.square().sum(), trained), plain)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    narrow = torch.autograd.grad(y.float().square().sum(), trained)
    assert {gradient.dtype for gradient in narrow} == {torch.float32}
    assert_all_close(narrow, plain, rtol=0.1, atol=0.1)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    compiled = torch.compile(layer, backend="aot_eager")
    assert_all_close(torch.autograd.grad(compiled(x).square().sum(), trained), plain)


def assert_all_close(found, expected, **keys):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **keys)


@by_layer
def test_it_learns(kind):
    torch.manual_seed(0)
    layer = kind.cls(12, 10, **kind.keys)
    target = torch.randn(10, 12) * 0.3
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        x = torch.randn(64, 12)
        loss = F.mse_loss(layer(x), x @ target.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
