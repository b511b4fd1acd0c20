"""CAST's scaled layer: at first what it replaces, its gradients the dense expression's, and folded what it computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.models.layers import ScaledLinear
from gracile.nm_pattern import largest

SHAPES = {"tall": (20, 12), "wide": (3, 24), "square": (12, 12)}
by_shape = pytest.mark.parametrize(("out", "inputs"), SHAPES.values(), ids=SHAPES)
by_bias = pytest.mark.parametrize("bias", [True, False])


def made(inputs, out, bias=True, dtype=torch.float64, **keys):
    """With scales that differ."""
    torch.manual_seed(0)
    layer = ScaledLinear(inputs, out, bias, dtype=dtype, **keys)
    with torch.no_grad():
        layer.A.add_(0.3 * torch.randn_like(layer.A))
    return layer


@by_shape
@by_bias
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_as_what_it_replaces(out, inputs, bias, dtype):
    linear = nn.Linear(inputs, out, bias, dtype=dtype).eval()
    layer = ScaledLinear.from_linear(linear, pieces=3)
    x = torch.randn(5, inputs, dtype=dtype)
    torch.testing.assert_close(layer(x), linear(x), rtol=0.01, atol=1e-5 if dtype == torch.float32 else 0.01)
    assert torch.equal(layer.merge().weight, linear.weight)
    assert not layer.training
    assert layer.A.shape == (out, 3)


@by_shape
@pytest.mark.parametrize("pieces", [1, 2, 12])
def test_each_piece_of_a_row_has_its_scale(out, inputs, pieces):
    layer = made(inputs, out, pieces=pieces)
    for r, c in ((0, 0), (1, inputs - 1), (out - 1, inputs // 2), (2, inputs // 3)):
        expected = layer.weight[r, c] * layer.A[r, c // (inputs // pieces)]
        assert layer.dense()[r, c] == expected


@by_shape
@by_bias
def test_gradients_in_fp64(out, inputs, bias):
    layer = made(inputs, out, bias, pieces=2)
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


@by_shape
@by_bias
def test_merged_it_computes_the_same_and_sparse_it_is_the_masked_and_folded_weight(out, inputs, bias):
    layer = made(inputs, out, bias, torch.float32, n=1, m=3)
    x = torch.randn(5, inputs)
    torch.testing.assert_close(layer.merge()(x), layer(x))
    mask = largest(layer.weight, 1, 3)
    effective = (layer.weight.unflatten(1, (2, -1)) * layer.A[:, :, None]).flatten(1).detach()
    layer.sparsify()
    plain = layer.merge()
    assert torch.equal(plain.weight, effective * mask)
    assert ((plain.weight != 0).unflatten(1, (-1, 3)).sum(2) == 1).all()
    torch.testing.assert_close(layer(x), F.linear(x, effective * mask, layer.bias))
    layer.sparsify()
    assert torch.equal(layer.merge().weight, plain.weight)


def test_nothing_of_the_weights_size_is_saved_between_the_passes():
    layer = made(48, 40, dtype=torch.float32)
    own = {tensor.untyped_storage().data_ptr() for tensor in layer.parameters()}
    saved = []

    def keep(tensor):
        saved.append(0 if tensor.untyped_storage().data_ptr() in own else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(4, 48)).sum()
    assert 0 < max(saved) <= 4 * 48


def test_autocast_checkpointing_and_compilation():
    layer = made(12, 16, dtype=torch.float32)
    x = torch.randn(8, 12, requires_grad=True)
    trained = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x).square().sum(), trained)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    compiled = torch.compile(layer, backend="aot_eager")
    for y in (again, compiled(x)):
        for one, other in zip(torch.autograd.grad(y.square().sum(), trained), plain, strict=True):
            torch.testing.assert_close(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    for one, other in zip(torch.autograd.grad(y.float().square().sum(), trained), plain, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pieces": 5}, "pieces must be a whole number that divides in_features=12, got 5"),
        ({"pieces": 0}, "pieces must be a whole number that divides in_features=12, got 0"),
        ({"m": 8}, "in_features must be a multiple of m=8, got 12"),
        ({"n": 5}, "n must be a whole number from 1 to m=4, got 5"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ScaledLinear(12, 8, **keys)
