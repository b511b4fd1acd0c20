"""AlignGuard: the parts add up, terms are zero where nothing has changed, and what alignment rests on is held back."""

import pytest
import torch
from adapted import attached, far

from gracile import adapters


def moved(**keys):
    model = attached("alignguard", **keys)
    with torch.no_grad():
        for layer in adapters.adapter_layers(model):
            layer.alignguard_B["default"].normal_()
    return model


def test_the_parts_are_the_change():
    for pairs in (1, 2):
        for layer in adapters.adapter_layers(moved(pairs=pairs, alpha=8)):
            D_A, D_T = layer.parts(layer.settings["default"], **layer.tensors("default"))
            assert far(D_A + D_T, layer.get_delta_weight("default")) < 1e-4
            Q = layer.alignguard_Q["default"]
            assert far(Q.mT @ Q, torch.eye(Q.shape[1])) < 1e-5
            if pairs == 1:
                assert far(Q @ (Q.mT @ D_A), D_A) < 1e-4
                assert far(Q.mT @ D_T, torch.zeros(Q.shape[1], layer.in_features)) < 1e-4


@pytest.mark.parametrize("pairs", [1, 2])
def test_the_terms(pairs):
    model = attached("alignguard", pairs=pairs)
    term = adapters.penalty(model)
    assert term == 0
    term.backward()
    for layer in adapters.adapter_layers(moved(pairs=pairs)):
        config, tensors = layer.settings["default"], layer.tensors("default")
        D_A, D_T = layer.parts(config, **tensors)
        weight = layer.base_layer.weight
        eta = 1 + torch.sigmoid((weight + D_A + D_T).abs() - weight.abs().median())
        overlap = (eta * (D_A * D_T).abs()).sum()
        angle = (D_A * D_T).sum() ** 2 / (D_A.norm() ** 2 * D_T.norm() ** 2)
        expected = 0.1 * (tensors["F"] * D_A**2).sum() + 0.01 * D_T.norm() ** 2 + 0.01 * 0.5 * overlap
        expected = expected + (0.01 * 0.5 * angle if pairs == 2 else 0)
        assert torch.allclose(layer.penalty(config, **tensors), expected, rtol=1e-4)
        assert abs(tensors["F"].mean() - 1) < 1e-5


def test_the_directions_are_those_of_the_gradients():
    model = attached("alignguard", k=4)
    config = model.peft_config["default"]
    for layer in adapters.adapter_layers(model):
        C = config.statistics[layer.name][:, : layer.out_features]
        Q = layer.alignguard_Q["default"]
        held = torch.trace(Q.mT @ C @ Q)
        assert abs(held - torch.linalg.eigvalsh(C)[-4:].sum()) < 1e-4 * held


def test_the_more_it_weighs_the_less_moves_there():
    sizes = []
    for weight in (0.0, 0.1, 1.0):
        model = attached("alignguard", pairs=1, l_a=weight, l_t=0.0, l_c=0.0)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.005)
        layers = list(adapters.adapter_layers(model))
        for _ in range(30):
            loss = sum(
                (layer.get_delta_weight("default") - layer.alignguard_Q["default"].sum(1, keepdim=True)).square().sum()
                for layer in layers[:1]
            )
            (loss + adapters.penalty(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
        D_A, _ = layers[0].parts(layers[0].settings["default"], **layers[0].tensors("default"))
        sizes.append(D_A.norm().item())
    assert sizes[0] > sizes[1] > sizes[2]
