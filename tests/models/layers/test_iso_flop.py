"""Layers of as many weights as a dense one: exact counts under every optimizer of masks, and what they compute."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gracile.models import build_llama
from gracile.models.convert import convert, merge
from gracile.models.layers import DopedLinear, FactorisedLinear, IsoFlopLinear, ParallelLinear
from gracile.optim import BlockSparseAdamW, RigLAdamW, SETAdamW, SparseAdamW, SRigLAdamW, param_groups

KINDS = {
    "parallel": (ParallelLinear, {}),
    "factorised": (FactorisedLinear, {}),
    "factorised relu": (FactorisedLinear, {"activation": "relu"}),
    "doped": (DopedLinear, {}),
}
by_kind = pytest.mark.parametrize(("cls", "keys"), KINDS.values(), ids=KINDS)
by_shape = pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 56), (32, 32)])  # tall, wide, square
not_linear = pytest.mark.parametrize(
    ("cls", "keys"),
    [(ParallelLinear, {"activation": f}) for f in ("relu", "gelu", "silu")] + [KINDS["factorised relu"]],
    ids=["relu", "gelu", "silu", "factorised"],
)


class Alone(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.mlp = layer

    def forward(self, x):
        return self.mlp(x)


def optimized(layer, optimizer=SparseAdamW, **keys):
    """Its masks are drawn. They change, if at all, after every other of six steps."""
    groups = param_groups(Alone(layer), sparsity=0.5, target_modules=["mlp"])
    return optimizer(groups, **{"lr": 0.01, "update_every": 2, "t_end": 6, **keys})


def kept(layer, optimizer):
    """How many weights a layer has where its masks are, and in matrices without one; elsewhere all are zero."""
    count = 0
    for name, p in layer.named_parameters():
        if name == "bias":
            continue
        if name in layer.sparse_parts():
            outside = torch.ones(p.numel(), dtype=torch.bool)
            outside[optimizer.state[p]["indices"].long()] = False
            assert not p.view(-1)[outside].any()
            count += len(optimizer.state[p]["indices"])
        else:
            count += p.numel()
    return count


def trained(layer, optimizer=SparseAdamW, **keys):
    """What a layer has kept after each of five steps."""
    made, counts = optimized(layer, optimizer, **keys), []
    for _ in range(5):
        made.zero_grad()
        layer(torch.randn(6, layer.in_features)).square().mean().backward()
        made.step()
        counts.append(kept(layer, made))
    return counts


# ---- counts ---------------------------------------------------------------------------------------------------------


@by_kind
@by_shape
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9])
def test_as_many_weights_stay_as_the_dense_layer_has(cls, keys, m, n, sparsity):
    """And as many FLOPs, 2 a weight and token: exactly, where the papers allow themselves rounding."""
    torch.manual_seed(0)
    layer = cls(n, m, sparsity=sparsity, **keys)
    assert trained(layer) == [m * n] * 5
    numbers = sum(p.numel() for name, p in layer.named_parameters() if name in layer.sparse_parts())
    stored = {"W0": 1, "U": 1, "W": 1 - sparsity}[next(iter(layer.sparse_parts()))] * m * n / (1 - sparsity)
    assert stored - 1 <= numbers <= stored + 8 * (m + n)


@by_kind
def test_each_part_has_its_own_density(cls, keys):
    layer = cls(24, 40, sparsity=0.75, **keys)
    optimized(layer)
    densities = layer.sparse_parts()
    for name, p in layer.named_parameters():
        share = densities.get(name, 1.0)
        assert abs(int(p.count_nonzero()) - share * p.numel()) < 1, name
    if cls is DopedLinear:
        assert layer.rank == math.floor(0.75 * 24 * 40 / 64)
        assert densities.keys() == {"W"}
    if cls is FactorisedLinear:
        assert layer.rank == 64  # 960 / (0.25 * 64) is 60


@by_kind
@pytest.mark.parametrize(
    ("optimizer", "own"),
    [
        (SETAdamW, {"distribution": "uniform"}),
        (SETAdamW, {"distribution": "erk"}),
        (RigLAdamW, {}),
        (SRigLAdamW, {}),
        (BlockSparseAdamW, {"block_size": 8, "initial_sparsity": None}),
    ],
    ids=["set", "set erk", "rigl", "srigl", "block"],
)
def test_every_optimizer_of_masks_takes_them(cls, keys, optimizer, own):
    torch.manual_seed(0)
    layer = cls(32, 64, sparsity=0.75, **keys)
    counts = trained(layer, optimizer, drop_fraction=0.3, **own)
    parts = [p for name, p in layer.named_parameters() if name in layer.sparse_parts()]
    # the nearest that rows with as many weights each, or blocks, can have
    slack = {SRigLAdamW: sum(len(p) for p in parts), BlockSparseAdamW: 64}.get(optimizer, 0)
    assert len(set(counts)) == 1
    assert abs(counts[0] - 64 * 32) <= slack


@by_kind
def test_in_a_llama_they_are_masked_alone_and_the_residual_stream_stays(cls, keys):
    torch.manual_seed(0)
    model = build_llama("2m", hidden_size=32, intermediate_size=88, num_hidden_layers=2, vocab_size=64)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    dense = {name: tuple(module.weight.shape) for name, module in linears.items() if "_proj" in name}
    others = {name: p.clone() for name, p in model.named_parameters() if "_proj" not in name}
    convert(model, cls, sparsity=0.75, **keys)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, IsoFlopLinear)}
    assert {name: (layer.out_features, layer.in_features) for name, layer in layers.items()} == dense

    groups = param_groups(model, sparsity=0.75, weight_decay=0.1)
    told = {id(getattr(x, part)): d for x in layers.values() for part, d in x.sparse_parts().items()}
    masked = {id(p): group["density"] for group in groups if group.get("density") is not None for p in group["params"]}
    assert masked == told
    assert len({group.get("density") for group in groups} - {None}) == len(set(told.values())), "a group for each"
    assert all(group["sparsity"] is None for group in groups)
    rest = [p for group in groups if group.get("density") is None for p in group["params"]]
    assert len(rest) + len(told) == len(list(model.parameters()))

    optimizer = SETAdamW(groups, lr=0.01, update_every=2, t_end=6)
    tokens = torch.randint(64, (2, 16))
    for _ in range(5):
        output = model(tokens, labels=tokens, output_hidden_states=True)
        assert {h.shape for h in output.hidden_states} == {(2, 16, 32)}
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert sum(kept(layer, optimizer) for layer in layers.values()) == sum(m * n for m, n in dense.values())
    for name, p in model.named_parameters():
        if name in others:
            assert not torch.equal(p, others[name]), f"{name} trains"


def test_what_does_not_match_is_masked_all_the_same_and_plain_layers_as_the_rest():
    model = nn.ModuleDict({"attn": nn.Linear(16, 16), "mlp": DopedLinear(16, 24, sparsity=0.5)})
    (attn, doped, *_) = param_groups(model, sparsity=0.9, target_modules=["attn"])
    assert (attn["sparsity"], len(attn["params"])) == (0.9, 1)
    assert (doped["density"], [id(p) for p in doped["params"]]) == (model.mlp.density, [id(model.mlp.W)])
    with pytest.raises(ValueError, match="'head' matches no trainable linear layer"):
        param_groups(model, sparsity=0.9, target_modules=["head"])
    unmasked = param_groups(model, 2, ["attn"])
    assert "density" not in unmasked[0]


# ---- what they compute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [ParallelLinear, DopedLinear])
def test_at_sparsity_zero_they_are_the_dense_layer(cls, dtype):
    linear = nn.Linear(24, 40, dtype=dtype)
    layer = cls.from_linear(linear, sparsity=0.0)
    x = torch.randn(2, 5, 24, dtype=dtype)
    assert torch.equal(layer(x), linear(x))
    assert torch.equal(layer.merge().weight, linear.weight)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in linear.parameters())


@pytest.mark.parametrize("f", ["relu", "gelu", "silu"])
@by_shape
def test_parallel_is_the_sum_of_its_branches(f, m, n):
    layer = ParallelLinear(n, m, sparsity=2 / 3, activation=f, dtype=torch.float64)
    x = torch.randn(7, n, dtype=torch.float64)
    exact = layer.bias.repeat(7, 1)
    for token in range(7):
        for j in range(3):
            exact[token] += getattr(F, f)(getattr(layer, f"W{j}") @ x[token])
    torch.testing.assert_close(layer(x), exact)
    assert len(list(layer.parameters())) == 4


@by_shape
def test_factorised_and_doped_are_what_they_are_merged_to(m, n):
    for cls in (FactorisedLinear, DopedLinear):
        layer = cls(n, m, sparsity=0.75)
        trained(layer)
        U, V = layer.U.double(), layer.V.double()
        exact = U @ V + (layer.W.double() if cls is DopedLinear else 0)
        x = torch.randn(5, n)
        plain = layer.merge()
        torch.testing.assert_close(plain.weight.double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-5)
    relu = FactorisedLinear(n, m, sparsity=0.75, activation="relu")
    x = torch.randn(5, n)
    torch.testing.assert_close(relu(x), (x @ relu.V.T).clamp(min=0) @ relu.U.T + relu.bias)


@pytest.mark.parametrize("cls", [FactorisedLinear, DopedLinear])
def test_a_converted_llama_computes_the_same_merged(cls):
    torch.manual_seed(0)
    model = build_llama("2m", hidden_size=32, intermediate_size=88, num_hidden_layers=1, vocab_size=64).eval()
    kinds = {name: type(module) for name, module in model.named_modules()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    convert(model, cls, sparsity=0.5)
    SparseAdamW(param_groups(model, sparsity=0.5), drop_fraction=0.0)
    tokens = torch.randint(64, (2, 16))
    with torch.no_grad():
        before = model(tokens).logits
        torch.testing.assert_close(merge(model)(tokens).logits, before, rtol=1e-4, atol=1e-5)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


@not_linear
@pytest.mark.parametrize(("m", "n"), [(5, 3), (3, 5), (4, 4)])
def test_gradients_of_what_is_not_linear_in_fp64(cls, keys, m, n):
    torch.manual_seed(1)
    layer = cls(n, m, sparsity=0.5, dtype=torch.float64, **keys)
    x = torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


@not_linear
def test_what_is_not_linear_does_not_merge(cls, keys):
    layer = cls(12, 20, sparsity=0.75, **keys)
    with pytest.raises(ValueError, match="is not linear: no plain layer computes what it does") as told:
        layer.merge()
    assert "\n" not in str(told.value)
    model = nn.ModuleDict({"first": DopedLinear(12, 20, sparsity=0.5), "mlp": layer})
    with pytest.raises(ValueError, match=f"{cls.__name__}.*is not linear"):
        merge(model)
    assert isinstance(model.first, DopedLinear), "a model that is refused stays as it was"


@not_linear
def test_bf16_autocast_and_the_meta_device(cls, keys):
    linear = nn.Linear(24, 40, dtype=torch.bfloat16)
    layer = cls.from_linear(linear, sparsity=0.75, **keys)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert torch.equal(layer.bias, linear.bias)
    assert trained_in_bf16(layer) == 24 * 40
    wide = cls(24, 40, sparsity=0.75, **keys)
    with torch.autocast("cpu", torch.bfloat16):
        y = wide(torch.randn(5, 24))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in wide.parameters()} == {torch.float32}
    with torch.device("meta"):
        empty = cls.from_linear(nn.Linear(24, 40), sparsity=0.75, **keys)
    assert {p.device.type for p in empty.parameters()} == {"meta"}


def trained_in_bf16(layer):
    optimizer = optimized(layer)
    y = layer(torch.randn(5, 24, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    optimizer.step()
    return kept(layer, optimizer)


# ---- starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_starts_have_the_variance_of_a_plain_layers(sparsity):
    """A third, for inputs of variance one; after the masks are drawn. Of parallel each branch has it."""
    torch.manual_seed(0)
    x = torch.randn(512, 300)
    layers = [
        DopedLinear(300, 400, False, sparsity=sparsity),
        FactorisedLinear(300, 400, False, sparsity=sparsity),
        FactorisedLinear(300, 400, False, sparsity=sparsity, activation="relu"),
        ParallelLinear(300, 400, False, sparsity=sparsity),
        DopedLinear(300, 400, False, sparsity=0.0),
    ]
    for layer in layers:
        optimized(layer)
        with torch.no_grad():
            y = F.linear(x, layer.W1) if isinstance(layer, ParallelLinear) else layer(x)
        assert y.square().mean().item() == pytest.approx(1 / 3, rel=0.06), layer
    doped = layers[0]
    low_rank = x @ doped.V.T @ doped.U.T
    assert low_rank.square().mean().item() == pytest.approx(1 / 6, rel=0.1)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "keys", "message"),
    [
        (ParallelLinear, {"sparsity": 0.6}, r"sparsity must be 1 - 1/k for k branches, such as 0.5, got 0.6"),
        (ParallelLinear, {"sparsity": 0.5, "activation": "tanh"}, "activation must be one of relu, gelu, silu, got 't"),
        (FactorisedLinear, {"sparsity": 0.5, "activation": "silu"}, "activation must be one of linear, relu, got 'si"),
        (FactorisedLinear, {"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\), got 1.0"),
        (DopedLinear, {"sparsity": -0.1}, r"sparsity must be a number in \[0, 1\), got -0.1"),
        (DopedLinear, {"sparsity": None}, r"sparsity must be a number in \[0, 1\), got None"),
        (DopedLinear, {"sparsity": math.nan}, r"sparsity must be a number in \[0, 1\), got nan"),
    ],
)
def test_bad_values_get_one_line(cls, keys, message):
    with pytest.raises(ValueError, match=message):
        cls(8, 8, **keys)


def test_a_few_digits_of_a_third_are_enough():
    assert ParallelLinear(8, 8, sparsity=0.667).branches == 3
    assert "branches=3, activation=silu" in repr(ParallelLinear(8, 8, sparsity=0.667))


def test_a_sparsity_too_small_for_a_rank_leaves_a_dense_matrix():
    layer = DopedLinear(8, 8, sparsity=0.2)
    assert (layer.rank, layer.density, layer.U) == (0, 1.0, None)
    assert torch.equal(layer.merge().weight, layer.W)
