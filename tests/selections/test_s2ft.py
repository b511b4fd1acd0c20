"""S2FT: which rows and columns are trained, also under grouped-query attention, and that nothing else moves."""

import pytest
import torch
from selected_models import llama, loss_of, moved, train, weights_of
from torch import nn

from gracile.optim import SparseAdamW, state_bytes
from gracile.selections import S2FT, Columns, Rows, selection_groups

CHANNELS, LAYERS = 48, 4


def selections(model, **keys):
    """The selection of each trained matrix, by its name."""
    (group,) = S2FT(**{"down_ratio": 0.0, **keys}).groups(model)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in group["params"]} == {name for name, p in model.named_parameters() if p.requires_grad}
    return {names[p]: own for p, own in group["selected"].items()}


def by_layer(found, leaf):
    return {int(name.split(".")[2]): own for name, own in found.items() if name.split(".")[-2] == leaf}


def test_ratios_are_of_the_channels_of_all_layers_together():
    found = by_layer(selections(llama(), down_ratio=0.125), "down_proj")
    counts = [len(own.numbers) for own in found.values()]
    assert sum(counts) == round(0.125 * CHANNELS * LAYERS)
    assert len(set(counts)) > 1, "drawn together, and not as many in each layer"
    assert all(isinstance(own, Columns) for own in found.values())


def test_sides_of_a_channel_share_it():
    found = selections(llama(), down_ratio=0.1, up_ratio=0.1, gate_ratio=0.2)
    down, up, gate = (by_layer(found, f"{side}_proj") for side in ("down", "up", "gate"))
    for layer, own in down.items():
        assert own.numbers == up[layer].numbers
        assert set(own.numbers) < set(gate[layer].numbers) or own.numbers == gate[layer].numbers
    assert all(isinstance(own, Rows) for own in (*up.values(), *gate.values()))


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (4, 2), (8, 2)])
def test_heads_come_with_their_group(heads, key_value_heads):
    """Published code moves queries by the number of key-value heads and the output by that of heads."""
    found = selections(llama(heads=heads, key_value_heads=key_value_heads), o_ratio=0.5, v_ratio=0.5)
    o, v = by_layer(found, "o_proj"), by_layer(found, "v_proj")
    size, share = 32 // heads, heads // key_value_heads
    assert o.keys() == v.keys()
    groups = 0
    for layer, own in v.items():
        kept = {row // size for row in own.numbers}
        assert own.numbers == tuple(g * size + i for g in sorted(kept) for i in range(size))
        queries = [g * share + h for g in sorted(kept) for h in range(share)]
        assert o[layer].numbers == tuple(h * size + i for h in queries for i in range(size))
        groups += len(kept)
    assert groups == key_value_heads * LAYERS // 2


def test_trained_columns_of_the_output_read_the_trained_heads():
    """A change of the rows of v reaches the columns of o that are trained, and no other."""
    model = llama(layers=1, heads=8, key_value_heads=2)
    found = selections(model, o_ratio=0.5, v_ratio=0.5)
    (v,), (o,) = by_layer(found, "v_proj").values(), by_layer(found, "o_proj").values()
    seen = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    loss_of(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[list(v.numbers)] += 1.0
    loss_of(model)
    changed = (seen[0] != seen[1]).flatten(0, 1).any(0).nonzero().view(-1).tolist()
    assert tuple(changed) == o.numbers


@pytest.mark.parametrize("keys", [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_only_the_selection_moves_and_by_the_dense_gradient(keys):
    """Biased and tied models too: nothing is permuted, so they compute what they did."""
    model = llama(**keys)
    ratios = {"down_ratio": 0.1, "up_ratio": 0.1, "o_ratio": 0.25, "v_ratio": 0.25}
    logits = loss_of(model)
    groups = selection_groups(model, "s2ft", **ratios)
    selected = dict(groups[0]["selected"])
    assert torch.equal(loss_of(model), logits), "to the bit, before any step"
    before, names = weights_of(model), {p: name for name, p in model.named_parameters()}
    optimizer = SparseAdamW(groups, lr=1e-2, weight_decay=0.1)
    alone = {p: nn.Parameter(taken(p.detach(), own).clone()) for p, own in selected.items()}
    reference = torch.optim.AdamW(alone.values(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        loss_of(model, step).backward()
        for p, own in alone.items():
            own.grad = taken(p.grad, selected[p]).clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    for p, own in selected.items():
        torch.testing.assert_close(taken(p.detach(), own), alone[p].detach(), rtol=0, atol=1e-6)
    by_name = {names[p]: own for p, own in selected.items()}
    for name, there in moved(model, before).items():
        own = by_name.get(name)
        if own is not None:
            assert taken(there, own).any(), name
            there[list(own.numbers) if isinstance(own, Rows) else (slice(None), list(own.numbers))] = False
        assert not there.any(), name
    count = sum(p.numel() for p in alone.values())
    assert state_bytes(optimizer) == 12 * count + 4 * len(alone)


def taken(W, own):
    return W[list(own.numbers)] if isinstance(own, Rows) else W[:, list(own.numbers)]


def test_a_choice_is_of_its_seed():
    one, same, other = (selections(llama(), down_ratio=0.1, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_state_is_planned_without_weights():
    held, planned = llama(), llama(device="meta")
    optimizers = [SparseAdamW(S2FT(o_ratio=0.25).groups(model), lr=0.0) for model in (held, planned)]
    train(held, optimizers[0], steps=1)
    bytes_ = sum(own.nbytes for _, state in optimizers[1].planned_state() for own in state)
    assert bytes_ == state_bytes(optimizers[0])


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"o_proj": nn.Linear(4, 4)})])


@pytest.mark.parametrize(
    ("model", "keys", "message"),
    [
        (llama(), {"down_ratio": 0.0}, "one ratio at least must be above 0"),
        (llama(), {"down_ratio": 1.5}, r"down_ratio must be a number in \[0, 1\], got 1.5"),
        (llama(), {"o_ratio": 0.01}, "o_ratio must be one of 8 heads at least, got 0.01"),
        (llama(), {"downratio": 0.1}, "downratio is no field of selection s2ft; did you mean 'down_ratio'"),
        (Bare(), {}, r"down_ratio: no block has a layer called, got \('down_proj', 'fc2'\)"),
        (Bare(), {"down_ratio": 0.0, "o_ratio": 0.5}, "o_ratio and v_ratio need model.config.num_attention_heads"),
        (nn.Linear(2, 2), {}, "the model has no numbered blocks"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(model, keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        selection_groups(model, "s2ft", **keys)
