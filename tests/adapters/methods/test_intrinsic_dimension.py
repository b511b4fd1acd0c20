"""Intrinsic dimension: the projection is linear, keeps lengths on average, and one vector is all that is trained."""

import pytest
import torch
from adapted import TARGETS, attached, far, llama, logits, train
from peft import PeftModel, get_peft_model

from gracile import adapters
from gracile.adapters.methods.intrinsic_dimension import dimension_for, hadamard, projected


def drawn(L, seed=0):
    g = torch.Generator().manual_seed(seed)
    B = torch.randint(0, 2, (L,), generator=g) * 2 - 1
    return torch.randn(L, generator=g, dtype=torch.float64), B, torch.randperm(L, generator=g)


def test_the_transform():
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    x = torch.randn(32, dtype=torch.float64)
    assert far(hadamard(x), H @ x) < 1e-12


def test_the_projection():
    G, B, order = drawn(64)
    a, b = torch.randn(2, 10, dtype=torch.float64)
    assert far(projected(a + 2 * b, G, B, order), projected(a, G, B, order) + 2 * projected(b, G, B, order)) < 1e-12
    lengths = torch.stack([projected(a, *drawn(64, seed)).square().sum() for seed in range(400)])
    assert abs(lengths.mean() / a.square().sum() - 1) < 0.1
    v = a.clone().requires_grad_()
    g = torch.randn(64, dtype=torch.float64)
    projected(v, G, B, order).backward(g)
    assert abs(v.grad @ b - projected(b, G, B, order) @ g) < 1e-10, "the adjoint"


def test_all_layers_share_one_vector(tmp_path):
    model = train(attached("intrinsicdimension"))
    vectors = {id(layer.intrinsicdimension_v["default"]) for layer in adapters.adapter_layers(model)}
    assert len(vectors) == 1
    model.save_pretrained(tmp_path)
    for low in (True, False):
        again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
        assert len({id(layer.intrinsicdimension_v["default"]) for layer in adapters.adapter_layers(again)}) == 1
        assert far(logits(again), logits(model)) == 0
        train(again)
        assert far(logits(again), logits(model)) > 1e-3


def test_lengths_are_equal_for_every_matrix():
    model = attached("intrinsicdimension", d=500)
    with torch.no_grad():
        next(adapters.adapter_layers(model)).intrinsicdimension_v["default"].normal_()
    v = next(adapters.adapter_layers(model)).intrinsicdimension_v["default"]
    for layer in adapters.adapter_layers(model):
        assert abs(layer.get_delta_weight("default").norm() / v.norm() - 1) < 0.3


def test_enough_dimensions_reach_any_change():
    config = adapters.IntrinsicDimensionConfig(d=8192, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False)), config)
    layer = next(adapters.adapter_layers(model))
    target, optimizer = torch.randn(8, 16), torch.optim.Adam([layer.intrinsicdimension_v["default"]], lr=0.1)
    for _ in range(200):
        (layer.get_delta_weight("default") - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert far(layer.get_delta_weight("default"), target) < 0.05


def test_the_dimension_that_is_enough():
    assert dimension_for([10, 100, 1000], [0.2, 0.6, 0.9], full=0.8) == pytest.approx(100 + 900 * 0.12 / 0.3)
    assert dimension_for([10, 100], [0.8, 0.9], full=0.8) == 10
    assert dimension_for([10, 100], [0.2, 0.3], full=0.8) is None


def test_the_projection_follows_from_the_seed():
    one = attached("intrinsicdimension")
    other = attached("intrinsicdimension", seed=1)
    pairs = zip(adapters.adapter_layers(one), adapters.adapter_layers(other), strict=True)
    assert not any(torch.equal(a.intrinsicdimension_G["default"], b.intrinsicdimension_G["default"]) for a, b in pairs)
    assert TARGETS
