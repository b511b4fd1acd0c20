"""SVFit: what is trained are singular values, in each parametrization; a rank from the weight's energy."""

import pytest
import torch
from adapted import attached, far, llama, logits
from peft import PeftModel

from gracile import adapters


@pytest.mark.parametrize("parametrization", ["normalized", "relative", "log"])
def test_the_singular_values_move(parametrization):
    for layer in adapters.adapter_layers(attached("svfit", parametrization=parametrization)):
        t, S = layer.svfit_t["default"], layer.svfit_S["default"]
        with torch.no_grad():
            t.copy_(0.1 * torch.rand(8))
        moved = {"normalized": S + S[0] * t, "relative": S * (1 + t), "log": S * t.exp()}[parametrization]
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
        U, V = layer.svfit_U["default"], layer.svfit_V["default"]
        assert far((U.mT @ merged @ V.mT).diagonal(), moved) < 1e-4
        assert far(merged - U * moved @ V, layer.base_layer.weight - U * S @ V) < 1e-4


def test_the_gradient_of_a_value():
    layer = next(adapters.adapter_layers(attached("svfit", parametrization="relative")))
    x, dy = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    layer(x).backward(dy)
    U, V, S = (layer.svfit_U["default"], layer.svfit_V["default"], layer.svfit_S["default"])
    assert far(layer.svfit_t["default"].grad, S * (U.mT @ dy.mT @ x @ V.mT).diagonal()) < 1e-3


def test_all_values_by_one_factor_scale_the_leading_part():
    layer = next(adapters.adapter_layers(attached("svfit", parametrization="relative")))
    with torch.no_grad():
        layer.svfit_t["default"].fill_(0.3)
    U, V, S = (layer.svfit_U["default"], layer.svfit_V["default"], layer.svfit_S["default"])
    assert far(layer.get_delta_weight("default"), 0.3 * (U * S) @ V) < 1e-5


def test_a_rank_that_holds_the_energy(tmp_path):
    model = attached("svfit", r=60, energy=0.5)
    for layer in adapters.adapter_layers(model):
        squares = torch.linalg.svdvals(layer.base_layer.weight).square()
        rank = len(layer.svfit_t["default"])
        assert squares[:rank].sum() >= 0.5 * squares.sum() > squares[: rank - 1].sum()
    with torch.no_grad():
        for layer in adapters.adapter_layers(model):
            layer.svfit_t["default"].fill_(0.1)
    model.save_pretrained(tmp_path)
    assert far(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model)) == 0
    few = attached("svfit", r=3, energy=0.99)
    assert {len(layer.svfit_t["default"]) for layer in adapters.adapter_layers(few)} == {3}
