"""PST: the schedule of zeros, exact counts, and the gradient of weights and scores through the mask."""

import pytest
import torch
from adapted import TARGETS, attached, far, ids, llama
from peft import get_peft_model

from gracile import adapters
from gracile.adapters.straight_through import packed_bits, unpacked_bits


def test_the_share_of_zeros():
    config = adapters.PSTConfig(target_modules=["q"], sparsity=0.8, total_steps=100, warmup=0.1, cooldown=0.2)
    shares = [config.share_at(step) for step in range(101)]
    assert shares[10] == 0
    assert shares[80] == shares[100] == pytest.approx(0.8)
    assert shares[45] == pytest.approx(0.8 * (1 - 0.5**3))
    assert shares == sorted(shares)


def test_the_count_of_zeros_is_exact():
    config = adapters.PSTConfig(r=4, target_modules=TARGETS, sparsity=0.37, total_steps=10, cooldown=0.5, warmup=0.0)
    model = get_peft_model(llama(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(1, 8):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        for layer in adapters.adapter_layers(model):
            zeros = int(config.share_at(step) * layer.base_layer.weight.numel())
            merged = layer.base_layer.weight + layer.get_delta_weight("default")
            assert (merged.abs() < 1e-9).sum() == zeros
    assert zeros == int(0.37 * layer.base_layer.weight.numel())


def test_the_gradient_through_the_mask():
    """G * M of the weight and through |W'|, and G * W' of the scores, as autograd has them of M + Z - Z.detach()."""
    layer = next(adapters.adapter_layers(attached("pst")))
    config = layer.settings["default"]
    generator = torch.Generator().manual_seed(0)
    m, n = layer.out_features, layer.in_features
    mask = torch.rand(m, n, generator=generator) > 0.4
    given = {
        name: torch.randn(getattr(layer, f"pst_{name}")["default"].shape, generator=generator, dtype=torch.float64)
        for name in layer.trained
    }
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    G = torch.randn(m, n, generator=generator, dtype=torch.float64)
    own = {name: value.clone().requires_grad_() for name, value in given.items()}
    (layer.delta(weight, config, **own, M=packed_bits(mask)) * G).sum().backward()
    ref = {name: value.clone().requires_grad_() for name, value in given.items()}
    W = weight + ref["U"] @ ref["V"]
    Z = W.abs() + ref["P"] @ ref["Q"] + ref["R"][:, None] + ref["C"]
    ((mask + Z - Z.detach()) * W * G).sum().backward()
    for name in layer.trained:
        assert far(own[name].grad, ref[name].grad) < 1e-9


def test_without_scores_it_is_magnitude():
    model = get_peft_model(
        llama(),
        adapters.PSTConfig(r=4, target_modules=TARGETS, a1=0.0, a2=0.0, sparsity=0.5, total_steps=2, cooldown=0.5),
    )
    model.base_model.step()
    for layer in adapters.adapter_layers(model):
        weight = layer.base_layer.weight
        mask = unpacked_bits(layer.pst_M["default"], tuple(weight.shape))
        zeros = int((~mask).sum())
        assert zeros
        assert weight[~mask].abs().max() <= weight[mask].abs().min()


def test_masks_change_every_so_many_steps():
    config = adapters.PSTConfig(r=4, target_modules=TARGETS, sparsity=0.5, total_steps=10, mask_every=3)
    model = get_peft_model(llama(), config)
    layer = next(adapters.adapter_layers(model))
    seen = []
    for _ in range(7):
        model.base_model.step()
        seen.append(int((~unpacked_bits(layer.pst_M["default"], tuple(layer.base_layer.weight.shape))).sum()))
    assert seen[:2] == [0, 0]
    assert seen[2] == seen[3] == seen[4] > 0
    assert seen[5] == seen[6] > seen[2]
