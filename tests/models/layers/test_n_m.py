"""N:M masks and the layer that computes with them: exact counts, ties, both flows of gradients, what is merged."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.models.convert import convert, merge
from gracile.models.layers import NMLinear
from gracile.nm_pattern import largest

PATTERNS = [(2, 4), (1, 3), (4, 4), (1, 16), (7, 8), (24, 64)]
SHAPES = {"tall": (20, 12), "wide": (3, 24), "square": (12, 12)}

by_pattern = pytest.mark.parametrize(("n", "m"), PATTERNS)
by_shape = pytest.mark.parametrize(("out", "inputs"), SHAPES.values(), ids=SHAPES)
by_bias = pytest.mark.parametrize("bias", [True, False])


def brute_force(weight, n, m):
    """Row by row, group by group: sorted by size, then by place."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for r, row in enumerate(weight.tolist()):
        for begin in range(0, len(row), m):
            order = sorted(range(begin, begin + m), key=lambda c: (-abs(row[c]), c))
            mask[r, order[:n]] = True
    return mask


def made(inputs, out, bias=True, dtype=torch.float64, **keys):
    torch.manual_seed(0)
    return NMLinear(inputs, out, bias, dtype=dtype, **keys)


# ---- masks ----------------------------------------------------------------------------------------------------------


@by_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_the_brute_force_one_where_many_are_equal(n, m, dtype):
    generator = torch.Generator().manual_seed(m)
    weights = {
        "ties": torch.randint(-2, 3, (9, 3 * m), generator=generator).to(dtype),
        "zeros": torch.zeros(2, 2 * m, dtype=dtype),
        "normal": torch.randn(5, 4 * m, generator=generator).to(dtype),
        "turned": torch.randn(4 * m, 5, generator=generator).to(dtype).t(),
    }
    for name, weight in weights.items():
        mask = largest(weight, n, m)
        assert torch.equal(mask, brute_force(weight, n, m)), name
        assert (mask.unflatten(1, (-1, m)).sum(2) == n).all()


def test_bits_that_differ_last_decide():
    near = torch.tensor([[1.0, 1.0 + 2**-23, 1.0, -1.0 - 2**-23]])
    assert largest(near, 2, 4).tolist() == [[False, True, False, True]]
    assert largest(near.bfloat16(), 2, 4).tolist() == [[True, True, False, False]]


# ---- the layer ------------------------------------------------------------------------------------------------------


@by_shape
@by_bias
def test_merged_it_computes_the_same_with_n_of_every_m(out, inputs, bias):
    layer = made(inputs, out, bias, torch.float32, n=1, m=3).eval()
    plain = layer.merge()
    assert type(plain) is nn.Linear
    assert ((plain.weight != 0).unflatten(1, (-1, 3)).sum(2) == 1).all()
    kept = plain.weight != 0
    assert torch.equal(plain.weight[kept], layer.weight[kept])
    for shape in ((5, inputs), (2, 3, inputs), (inputs,)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), plain(x))


@by_shape
@by_bias
@pytest.mark.parametrize("residue", [0.0, 0.3, 1.0])
def test_the_scaled_flow_is_the_derivative(out, inputs, bias, residue):
    layer = made(inputs, out, bias, n=1, m=3, flow="scaled")
    layer.residue = residue
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


@by_shape
@pytest.mark.parametrize("residue", [0.0, 0.3, 1.0])
def test_the_straight_flow_is_the_gradient_of_the_masked_weight(out, inputs, residue):
    """All of it, not scaled, and that of x goes through the mask."""
    layer = made(inputs, out, n=1, m=3)
    layer.residue = residue
    mask = largest(layer.weight, 1, 3).double()
    masked = (layer.weight.detach() * (mask + (1 - mask) * residue)).requires_grad_()
    x, other = (torch.randn(4, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    x.requires_grad_(), other.requires_grad_()
    layer(x).sin().sum().backward()
    F.linear(other, masked, layer.bias.detach()).sin().sum().backward()
    torch.testing.assert_close(layer.weight.grad, masked.grad)
    torch.testing.assert_close(x.grad, other.grad)
    assert layer.weight.grad.all()


def test_with_all_of_the_rest_it_is_the_dense_layer_and_with_none_the_masked_one():
    layer = made(12, 20, n=2, m=4)
    x = torch.randn(5, 12, dtype=torch.float64)
    layer.residue = 1.0
    assert torch.equal(layer(x), F.linear(x, layer.weight) + layer.bias)
    layer.residue = 0.0
    assert torch.equal(layer(x), F.linear(x, layer.weight * largest(layer.weight, 2, 4)) + layer.bias)
    layer.residue = 1e-9
    torch.testing.assert_close(layer(x), layer.merge()(x), rtol=0, atol=1e-7)


def test_what_is_pruned_comes_back():
    """Straight through, pruned weights grow until they are kept; with the literal derivative they do not move."""
    target = torch.tensor([[0.0, 1.0, 0.0, 0.0] * 2])
    held = {}
    for flow, steps in (("ste", 60), ("scaled", 3)):
        layer = held[flow] = made(8, 1, False, torch.float32, n=1, m=4, flow=flow)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[0.5, 0.1, 0.1, 0.1] * 2]))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            (layer(torch.eye(8)) - target.t()).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(held["ste"].dense(), target, rtol=0, atol=0.02)
    assert held["scaled"].weight[0, :4].tolist() == pytest.approx([0.5 * 0.8**3, 0.1, 0.1, 0.1])


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


def test_it_takes_the_place_of_a_linear_layer():
    linear = nn.Linear(20, 12, dtype=torch.bfloat16).eval()
    layer = NMLinear.from_linear(linear, n=3, m=5)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)
    assert not layer.training
    assert layer.weight.dtype == torch.bfloat16
    assert ((layer.merge().weight != 0).unflatten(1, (-1, 5)).sum(2) == 3).all()
    with torch.device("meta"):
        empty = NMLinear.from_linear(nn.Linear(20, 12, bias=False))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert "2:4, flow=ste" in repr(empty)


def test_autocast_checkpointing_copies_and_compilation():
    layer = made(12, 16, dtype=torch.float32, flow="scaled")
    layer.residue = 0.5
    x = torch.randn(8, 12, requires_grad=True)
    trained = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x).square().sum(), trained)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert_all_close(torch.autograd.grad(again.square().sum(), trained), plain)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    narrow = torch.autograd.grad(y.float().square().sum(), trained)
    assert {gradient.dtype for gradient in narrow} == {torch.float32}
    assert_all_close(narrow, plain, rtol=0.1, atol=0.1)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    compiled = torch.compile(layer, backend="aot_eager")
    for residue in (0.5, 0.25, 0.0):
        layer.residue = residue
        found = torch.autograd.grad(compiled(x).square().sum(), trained)
        assert_all_close(found, torch.autograd.grad(layer(x).square().sum(), trained))


def assert_all_close(found, expected, **keys):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **keys)


def test_a_mask_decays_in_a_compiled_model_without_compiling_anew_each_step():
    layer = made(12, 16, dtype=torch.float32)
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counted)
    for step in range(12):
        layer.residue = 1 - (step + 1) / 20
        compiled(torch.randn(8, 12))
    assert counted.frame_count <= 2


def test_masks_are_of_the_wide_weight_under_autocast():
    """In bf16 the first two would be equals of the last."""
    layer = made(4, 1, False, torch.float32, n=1, m=4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0001, 0.5, 1.0002]]))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.eye(4)).view(-1).tolist() == [0, 0, 0, 1]


def test_a_model_is_converted_and_merged():
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    convert(net, NMLinear, ["0", "2"])
    assert isinstance(net[2], NMLinear)
    x = torch.randn(4, 8)
    before = net(x)
    torch.testing.assert_close(merge(net)(x), before)
    assert type(net[2]) is nn.Linear


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 kernels are for GPUs")
def test_the_kernel_of_a_gpu_computes_the_same():
    layer = made(128, 256, dtype=torch.float16).cuda()
    plain = layer.merge()
    x = torch.randn(64, 128, dtype=torch.float16, device="cuda")
    dense = plain(x)
    plain.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(plain.weight.detach()))
    torch.testing.assert_close(plain(x), dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"m": 5}, "in_features must be a multiple of m=5, got 12"),
        ({"n": 0}, "n must be a whole number from 1 to m=4, got 0"),
        ({"n": 5}, "n must be a whole number from 1 to m=4, got 5"),
        ({"n": 1.0}, "n must be a whole number from 1 to m=4, got 1.0"),
        ({"m": 1, "n": 1}, "m must be a whole number from 2 to 256, got 1"),
        ({"m": 512}, "m must be a whole number from 2 to 256, got 512"),
        ({"flow": "strait"}, "flow must be one of ste, scaled, got 'strait'"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        NMLinear(12, 8, **keys)
