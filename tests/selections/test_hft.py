"""HFT: how many matrices of each category are trained, which, and that the others stay as they are."""

import pytest
import torch
from selected_models import llama, moved, train, weights_of
from torch import nn

from gracile.optim import GaLoreAdamW, param_groups, state_bytes
from gracile.selections import HFT, selection_groups

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def trained(model, names, layer):
    """The names of those that are trained in a layer."""
    own = model.model.layers[layer].named_parameters()
    return {name.split(".")[-2] for name, p in own if p.requires_grad and name.split(".")[-2] in names}


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7])
def test_half_of_each_category_is_trained(layers):
    model = llama(layers)
    HFT(seed=3).groups(model)
    assert all(len(trained(model, ATTENTION, i)) == 2 for i in range(layers))
    counts = [len(trained(model, MLP, i)) for i in range(layers)]
    assert set(counts) <= {1, 2}
    assert abs(sum(counts) - 1.5 * layers) < 1, "half, or off by less than a matrix where layers are odd"
    assert all(len(trained(model, NORMS, i)) == 1 for i in range(layers))
    outside = [model.model.embed_tokens, model.model.norm, model.lm_head]
    assert all(p.requires_grad for module in outside for p in module.parameters())


def chosen(model, **keys):
    HFT(**keys).groups(model)
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_choice_is_of_its_seed_and_round():
    model = llama()
    first = chosen(model, seed=1)
    assert chosen(model, seed=1, round=1) != first
    assert chosen(model, seed=2) != first
    assert chosen(model, seed=1) == first == chosen(llama(seed=5), seed=1)


def test_rounds_reach_every_matrix_and_random_layers_have_two_of_the_mlp():
    model, seen, twos = llama(2), set(), set()
    for number in range(12):
        seen |= {*chosen(model, round=number)}
        twos |= {i for i in range(2) if len(trained(model, MLP, i)) == 2}
    assert seen == {name for name, _ in model.named_parameters()}
    assert twos == {0, 1}


@pytest.mark.parametrize("low_rank", [False, True])
def test_what_is_frozen_keeps_its_bits_under_decay_and_has_no_state(low_rank):
    model = llama()
    before = weights_of(model)
    groups = HFT(weight_decay=0.1).groups(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    if low_rank:
        optimizer = GaLoreAdamW(param_groups(model, rank=4, weight_decay=0.1), lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
    train(model, optimizer)
    assert {name for name, there in moved(model, before).items() if not there.any()} == frozen
    assert len(optimizer.state) == len(before) - len(frozen)
    if not low_rank:
        held = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert state_bytes(optimizer) == 8 * held + 4 * len(optimizer.state)


def test_a_next_round_goes_on_with_the_weights():
    model = llama()
    first = set(chosen(model))
    train(model, torch.optim.AdamW(HFT().groups(model), lr=1e-2))
    before = weights_of(model)
    train(model, torch.optim.AdamW(HFT(round=1).groups(model), lr=1e-2))
    now = {name for name, there in moved(model, before).items() if there.any()}
    assert now != first
    assert now - first


def test_all_of_it_is_full_fine_tuning():
    half, full = llama(), llama()
    chosen(half)
    train(half, torch.optim.AdamW(HFT(share=1.0).groups(half), lr=1e-2))
    train(full, torch.optim.AdamW(param_groups(full), lr=1e-2))
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), full.parameters(), strict=True))


def test_a_bias_goes_with_its_matrix():
    model = llama(attention_bias=True)
    HFT().groups(model)
    for layer in model.model.layers:
        for part in ATTENTION:
            projection = getattr(layer.self_attn, part)
            assert projection.weight.requires_grad == projection.bias.requires_grad


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"qkv_proj": nn.Linear(4, 12), "o_proj": nn.Linear(4, 4)})])


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        (Fused(), {}, "hft trains whole matrices, and layers.0.qkv_proj holds several; choose sara"),
        (nn.Linear(2, 2), {}, "the model has no numbered blocks with matrices"),
        (None, {"share": 0.0}, r"share must be a number in \(0, 1\], got 0.0"),
        (None, {"round": -1}, "round must be a whole number >= 0, got -1"),
        (None, {"seed": 1.5}, "seed must be a whole number >= 0, got 1.5"),
        (None, {"weight_decay": -1}, "weight_decay must be a number >= 0 or None, got -1"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(model, keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        selection_groups(model, "hft", **keys)
