"""LoRA-XS: the gradient of R, and a start that is drawn."""

import torch
from adapted import attached, far, llama, logits

from gracile import adapters


def test_the_gradient_of_r_is_the_weights_between_the_factors():
    layer = next(adapters.adapter_layers(attached("loraxs")))
    x, dy = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    layer(x).backward(dy)
    G = dy.mT @ x
    expected = layer.scale("default") * layer.loraxs_B["default"].mT @ G @ layer.loraxs_A["default"].mT
    assert far(layer.loraxs_R["default"].grad, expected) < 1e-3
    assert expected.abs().max() > 1


def test_factors_are_the_weights_leading_ones():
    for layer in adapters.adapter_layers(attached("loraxs")):
        A, B = layer.loraxs_A["default"], layer.loraxs_B["default"]
        S = torch.linalg.svdvals(layer.base_layer.weight)
        assert far(A.norm(dim=1), S[:4]) < 1e-4
        assert far(torch.linalg.matrix_norm(layer.base_layer.weight - B @ A), S[4:].norm()) < 1e-4
        assert not A.requires_grad
        assert not B.requires_grad


def test_a_drawn_start():
    found = attached("loraxs", init_std=0.1)
    assert far(logits(found), logits(llama())) > 1e-4
    assert far(logits(found), logits(attached("loraxs", init_std=0.1))) == 0
    assert far(logits(found), logits(attached("loraxs", init_std=0.1, seed=1))) > 1e-4
