"""What holds of the change of every method: its gradient, its short way through thin factors, its refusals."""

import math

import pytest
import torch
from adapted import CASES, TARGETS, attached, config_of, far, ids, llama
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from gracile import adapters

THROUGH_MASKS = ("masktuning", "pst")  # whose gradient is not that of what is computed
each = pytest.mark.parametrize("name", CASES)


def layer_of(name, **keys):
    """A layer whose tensors are no longer what they began with."""
    model = attached(name, **keys)
    generator = torch.Generator().manual_seed(1)
    layer = next(adapters.adapter_layers(model))
    with torch.no_grad():
        for held in layer.adapter_layer_names:
            p = getattr(layer, held)["default"]
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return layer


@each
def test_the_gradient_of_the_change(name):
    if name in THROUGH_MASKS:
        pytest.skip("a straight-through gradient, which its own test has")
    layer = layer_of(name)
    config = layer.settings["default"]
    tensors = {
        key: value.double() if value.is_floating_point() else value for key, value in layer.tensors("default").items()
    }
    moved = {key: tensors[key].detach().requires_grad_() for key in layer.trained}
    weight = layer.wide_weight().double()
    x = torch.randn(2, layer.in_features, dtype=torch.float64)

    def change(*given):
        return F.linear(x, layer.delta(weight, config, **{**tensors, **dict(zip(moved, given, strict=True))}))

    assert torch.autograd.gradcheck(change, tuple(moved.values()), fast_mode=True)


@each
def test_the_way_through_thin_factors_is_the_change(name):
    layer = layer_of(name)
    x = torch.randn(3, 5, layer.in_features)
    expected = F.linear(x, layer.get_delta_weight("default"))
    found = layer.changed(x, "default") * layer.scale("default")
    assert far(found, expected) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert expected.abs().max() > 1e-3
    if CASES[name].is_low_rank:
        left, right = layer.lora_factors("default")
        assert far(left @ right, layer.get_delta_weight("default")) < 1e-6


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "dropout" not in case.config.without_effect])
def test_dropout_is_on_the_change_alone_and_in_training(name):
    layer = layer_of(name, dropout=0.5)
    x = torch.randn(4, layer.in_features)
    layer.train()
    torch.manual_seed(0)
    one, other = layer(x), layer(x)
    assert far(one, other) > 1e-4
    layer.eval()
    assert torch.equal(layer(x), layer(x))


BAD = [
    (adapters.LoraXSConfig, {"r": 0}, "r must be a whole number >= 1, got 0"),
    (adapters.LoraXSConfig, {"r": 2.5}, "r must be a whole number >= 1, got 2.5"),
    (adapters.LoraXSConfig, {"alpha": -1}, "alpha must be a number > 0 or None, got -1"),
    (adapters.LoraXSConfig, {"dropout": 1.0}, "dropout must be a number in [0, 1), got 1.0"),
    (adapters.LoraXSConfig, {"rank_pattern": {"q_proj": 0}}, "rank_pattern must map names to whole numbers >= 1"),
    (adapters.SorsaConfig, {"gamma": math.nan}, "gamma must be a number >= 0, got nan"),
    (adapters.SVFitConfig, {"energy": 1.5}, "energy must be a number in (0, 1] or None, got 1.5"),
    (adapters.SVFitConfig, {"parametrization": "raw"}, "parametrization must be one of normalized, relative, log"),
    (adapters.LoraSBConfig, {"start": "svd"}, "start must be one of sign, gradient, zero, got 'svd'"),
    (adapters.MaskTuningConfig, {"score": 1e-3}, "score must be above threshold=0.005, got 0.001"),
    (adapters.PSTConfig, {"warmup": 0.8}, "warmup and cooldown must be below 1 together, got 0.8 and 0.3"),
    (adapters.PSTConfig, {"alpha": 8}, "alpha has no effect with PSTConfig, got 8; leave it out"),
    (adapters.MaskTuningConfig, {"r": 64}, "r has no effect with MaskTuningConfig, got 64; leave it out"),
    (adapters.MaskTuningConfig, {"dropout": 0.1}, "dropout has no effect with MaskTuningConfig, got 0.1"),
    (adapters.IntrinsicDimensionConfig, {"alpha": 2.0}, "alpha has no effect with IntrinsicDimensionConfig, got 2.0"),
    (adapters.ALLoraConfig, {"eta": 0}, "eta must be a number > 0, got 0"),
    (adapters.DSEEConfig, {"support": "all"}, "support must be one of residual, grebsmo, got 'all'"),
    (adapters.AlignGuardConfig, {"pairs": 3}, "pairs must be one of 1, 2, got 3"),
    (adapters.BALoraConfig, {"k": 0}, "k must be a whole number >= 1, got 0"),
    (adapters.IntrinsicDimensionConfig, {"d": -3}, "d must be a whole number >= 1, got -3"),
]


@pytest.mark.parametrize(
    ("kind", "keys", "said"), BAD, ids=lambda value: value.__name__ if isinstance(value, type) else None
)
def test_bad_values_are_named(kind, keys, said):
    with pytest.raises(ValueError) as refused:
        kind(target_modules=["q_proj"], **keys)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_slip_in_a_key_is_refused():
    with pytest.raises(TypeError, match="rnk"):
        adapters.SorsaConfig(rnk=8)


def test_a_rank_above_the_short_side_names_the_layer():
    with pytest.raises(
        ValueError, match=r"r must be at most 32 for model.layers.0.self_attn.v_proj \(32 x 64\), got 40"
    ):
        attached("loraxs", r=40)
    model = attached("loraxs", r=40, rank_pattern={"v_proj": 8})
    ranks = {layer.name.rpartition(".")[2]: len(layer.loraxs_R["default"]) for layer in adapters.adapter_layers(model)}
    assert ranks == {"q_proj": 40, "v_proj": 8, "down_proj": 40}


def test_a_layer_that_is_merged_takes_no_adapter():
    model = attached("sorsa")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; unmerge it before adding an adapter"):
        model.add_adapter("other", config_of("sorsa"))


def test_no_two_layers_begin_with_the_same_numbers():
    held = [layer.allora_A["default"] for layer in adapters.adapter_layers(attached("allora"))]
    alike = [a for a in held if a.shape == held[0].shape]
    assert len(alike) >= 4
    assert not any(torch.equal(a, b) for i, a in enumerate(alike) for b in alike[:i])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    for name in CASES:
        base, config = llama(), config_of(name)
        torch.manual_seed(7)
        get_peft_model(base, config)
        assert torch.equal(torch.rand(3), expected), name


def test_a_method_of_ones_own():
    """A gradient rule by an autograd function, and an event at each step."""
    from own_method import RowsConfig

    model = get_peft_model(llama(), RowsConfig(r=2, target_modules=["q_proj"]))
    layer = next(adapters.adapter_layers(model))
    x = ids()
    model.train()(input_ids=x, labels=x).loss.backward()
    grad = layer.rows_B["default"].grad.clone()
    layer.settings["default"].floor *= 4
    model.zero_grad()
    model(input_ids=x, labels=x).loss.backward()
    assert torch.allclose(layer.rows_B["default"].grad * 2, grad, rtol=1e-4)  # 1 / sqrt(0.1) is twice 1 / sqrt(0.4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(3):
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
    assert layer.rows_mask["default"].mean() < 0.6
    assert model.base_model.steps == 3


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(KeyError, match="peft has a method SORSA already"):
        adapters.register(adapters.AdapterType.SORSA, adapters.LoraXSConfig)(
            type(next(adapters.adapter_layers(attached("sorsa"))))
        )
    with pytest.raises(ValueError, match="prefix must be 'sorsa_'"):
        adapters.register(adapters.AdapterType.SORSA, adapters.SorsaConfig)(adapters.LowRankLayer)


def test_linear_layers_alone():
    with pytest.raises(ValueError, match=r"SorsaConfig adapts linear layers, and 0 is a Conv2d"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), adapters.SorsaConfig(r=2, target_modules=["0"]))


@each
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "made anew"])
def test_on_a_base_without_memory_there_are_the_same_tensors(name, stored):
    """Shapes and dtypes, by which ``gracile memory`` plans."""
    keys = {} if stored else {"save_projection": False}
    if not stored and not CASES[name].projection:
        pytest.skip("it has nothing that could be left out")
    real = attached(name, **keys)
    with torch.device("meta"):
        base = llama()
    planned = get_peft_model(base, CASES[name].config(**{"target_modules": TARGETS, **CASES[name].keys, **keys}))

    def tensors(model):
        return {key: (tuple(p.shape), p.dtype) for key, p in [*model.named_parameters(), *model.named_buffers()]}

    assert tensors(planned) == tensors(real)
    assert all(p.is_meta for p in [*planned.parameters(), *planned.buffers()])
