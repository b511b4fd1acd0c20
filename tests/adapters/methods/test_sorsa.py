"""SORSA: the regulariser is zero at first, holds factors orthonormal, and without it the split alone is trained."""

import torch
from adapted import attached, far, llama, logits, train

from gracile import adapters


def test_the_penalty_is_nothing_at_first():
    model = attached("sorsa", gamma=1.0)
    term = adapters.penalty(model)
    term.backward()
    assert term < 1e-9
    assert all(p.grad.abs().max() < 1e-4 for p in model.parameters() if p.grad is not None)


def test_it_holds_factors_orthonormal():
    def defect(gamma):
        model = attached("sorsa", gamma=gamma)
        train(model, 20, lr=1e-2)
        for layer in adapters.adapter_layers(model):
            layer.settings["default"].gamma = 1.0
        return adapters.penalty(model).item()

    free, held = defect(0.0), defect(50.0)
    assert held < free / 20


def test_what_is_added_is_what_was_taken_off():
    for layer in adapters.adapter_layers(attached("sorsa", alpha=16)):
        U, S, V = (getattr(layer, f"sorsa_{name}")["default"] for name in "USV")
        exact = torch.linalg.svd(layer.base_layer.weight)
        assert torch.allclose(S * layer.scale("default"), exact.S[:4], rtol=1e-4)
        assert far(U.mT @ U, torch.eye(4)) < 1e-5
        assert far(layer.get_delta_weight("default"), torch.zeros_like(layer.base_layer.weight)) < 1e-6
        assert V.shape == (4, layer.in_features)


def test_factors_of_a_base_in_bf16_are_orthonormal():
    for layer in adapters.adapter_layers(attached("sorsa", llama(dtype=torch.bfloat16))):
        assert far(layer.sorsa_U["default"].mT @ layer.sorsa_U["default"], torch.eye(4)) < 1e-5


def test_the_base_is_whole():
    model = train(attached("sorsa"))
    assert far(logits(model.unload()), logits(llama())) == 0
