"""DSEE: places off which nothing moves, a base pruned by exact counts, which is there again when it is switched off."""

import pytest
import torch
from adapted import attached, far, llama, logits, train

from gracile import adapters
from gracile.adapters.methods.dsee import sparse_part
from gracile.adapters.straight_through import unpacked_bits


def test_the_places_are_what_low_rank_does_not_hold():
    for layer in adapters.adapter_layers(attached("dsee")):
        weight = layer.base_layer.weight
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
        left = (weight - (U[:, :4] * S[:4]) @ V[:4]).abs().flatten()
        places = layer.dsee_places["default"]
        assert len(places.unique()) == 10
        assert left[places].min() >= left.topk(11).values[-1] - 1e-5


def test_the_greedy_decomposition_finds_planted_entries():
    torch.manual_seed(0)
    low = 0.05 * torch.randn(40, 3) @ torch.randn(3, 30)
    planted = torch.zeros(1200)
    places = torch.randperm(1200)[:12]
    planted[places] = 3.0
    S = sparse_part(low + planted.view(40, 30), torch.Generator().manual_seed(0))
    found = S.abs().flatten().topk(12).indices
    assert set(found.tolist()) == set(places.tolist())
    attached("dsee", support="grebsmo")


@pytest.mark.parametrize("score", ["W", "WAB", "WABS", "AB", "ABS"])
def test_the_base_is_pruned_by_the_count(score):
    model = train(attached("dsee"))
    layers = list(adapters.adapter_layers(model))
    weights = [layer.base_layer.weight.clone() for layer in layers]
    scores = torch.cat([layer.score("default", score).detach().abs().flatten() for layer in layers])
    adapters.prune_base(model, 0.3, score)
    taken = [layer.get_delta_weight("default") - sum(layer.update_of("default")) for layer in layers]
    masks = [
        unpacked_bits(layer.dsee_M["default"], tuple(weight.shape))
        for layer, weight in zip(layers, weights, strict=True)
    ]
    for weight, off, mask in zip(weights, taken, masks, strict=True):
        assert far(weight + off, weight * mask) < 1e-6
    zeros = ~torch.cat([mask.flatten() for mask in masks])
    assert zeros.sum() == int(0.3 * len(scores))
    assert scores[zeros].max() <= scores[~zeros].min()
    assert all(torch.equal(layer.base_layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))
    with model.disable_adapter():
        assert far(logits(model), logits(llama())) == 0
    found = logits(model)
    train(model)
    assert far(logits(model), found) > 1e-3
    merged = logits(model)
    assert far(logits(model.merge_and_unload()), merged) < 1e-5


def test_a_pruned_base_is_saved_and_loaded(tmp_path):
    from peft import PeftModel

    model = train(attached("dsee"))
    adapters.prune_base(model, 0.5)
    model.save_pretrained(tmp_path)
    assert far(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model)) == 0


def test_what_is_refused():
    model = attached("dsee")
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\), got 1.0"):
        adapters.prune_base(model, 1.0)
    with pytest.raises(ValueError, match="score must be one of W, WAB, WABS, AB, ABS, got 'NAB'"):
        adapters.prune_base(model, 0.5, "NAB")
    with pytest.raises(ValueError, match="adapter must be one of DSEEConfig, got 'other'"):
        adapters.prune_base(model, 0.5, adapter="other")
    with pytest.raises(ValueError, match=r"entries must be at most 4096, the weights of model.layers.0.self_attn"):
        attached("dsee", entries=5000)
