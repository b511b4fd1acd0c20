"""Selections on models other than a LLaMA: Qwen2 with biases and tied embeddings, Qwen3 with norms in its attention and
heads wider than its rows, both under grouped queries; GPT-2, whose weights lie inputs x outputs, three in one layer."""

import pytest
import torch
from selected_models import loss_of, moved, train, weights_of
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, Qwen3Config

from gracile.optim import SparseAdamW
from gracile.selections import Rows, selection_groups

SIDES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8}
GROUPED = {"vocab_size": 64, "max_position_embeddings": 64, "num_key_value_heads": 2, "tie_word_embeddings": True}
CONFIGS = {
    "qwen2": Qwen2Config(**SIDES, **GROUPED),
    "qwen3": Qwen3Config(**SIDES, **GROUPED, head_dim=8),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64),
}
grouped = pytest.mark.parametrize("family", ["qwen2", "qwen3"])


def model_of(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family])


def attention_of(model):
    return [layer.self_attn for layer in model.model.layers]


@grouped
def test_s2ft_trains_the_columns_that_read_the_trained_heads_and_no_bias(family):
    model = model_of(family)
    groups = selection_groups(model, "s2ft", down_ratio=0.1, o_ratio=0.5, v_ratio=0.5)
    selected, before = dict(groups[0]["selected"]), weights_of(model)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p].rpartition("_proj")[0].rpartition(".")[2] for p in selected} == {"down", "o", "v"}
    units = 0
    for attention in attention_of(model):
        v, o = (selected.get(getattr(attention, f"{side}_proj").weight) for side in ("v", "o"))
        assert (v is None) == (o is None)
        if v is None:
            continue
        units += len(v.numbers) // attention.head_dim
        seen = []
        handle = attention.o_proj.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].detach()))
        loss_of(model)
        with torch.no_grad():
            attention.v_proj.weight[list(v.numbers)] += 1.0
            loss_of(model)
            attention.v_proj.weight.copy_(before[names[attention.v_proj.weight]])
        handle.remove()
        changed = (seen[0] != seen[1]).flatten(0, 1).any(0).nonzero().view(-1).tolist()
        assert tuple(changed) == o.numbers
        assert len(o.numbers) == len(v.numbers) * SIDES["num_attention_heads"] // GROUPED["num_key_value_heads"]
    assert units == 4, "half of the key-value heads of four blocks"
    train(model, SparseAdamW(groups, lr=1e-2, weight_decay=0.1))
    by_name = {names[p]: own for p, own in selected.items()}
    for name, there in moved(model, before).items():
        own = by_name.get(name)
        if own is not None:
            lines = there if isinstance(own, Rows) else there.mT
            assert lines[list(own.numbers)].any(1).all()
            lines[list(own.numbers)] = False
        assert not there.any(), name


@grouped
def test_hft_trains_half_of_each_category_with_its_biases(family):
    model = model_of(family)
    before = weights_of(model)
    optimizer = torch.optim.AdamW(selection_groups(model, "hft", weight_decay=0.1), lr=1e-2)
    for layer in model.model.layers:
        own = [part for part in layer.modules() if getattr(part, "weight", None) is not None]
        norms = [part.weight.requires_grad for part in own if "Norm" in type(part).__name__]
        assert sum(norms) * 2 == len(norms) == {"qwen2": 2, "qwen3": 4}[family]
        matrices = [part for part in own if "Norm" not in type(part).__name__]
        assert len(matrices) == 7
        assert (
            sum(part.weight.requires_grad for part in matrices if part.weight in {*layer.self_attn.parameters()}) == 2
        )
        for part in matrices:
            assert part.bias is None or part.bias.requires_grad == part.weight.requires_grad
    train(model, optimizer)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name, there in moved(model, before).items() if not there.any()} == frozen


@pytest.mark.parametrize("family", CONFIGS)
def test_sara_trains_its_share_of_the_matrices_of_blocks(family):
    model = model_of(family)
    before = weights_of(model)
    parts = ("c_attn.weight", "c_proj.weight", "c_fc.weight") if family == "gpt2" else ("_proj.weight",)
    matrices = {name: p for name, p in model.named_parameters() if name.endswith(parts)}
    optimizer = SparseAdamW(selection_groups(model, "sara", share=0.125), lr=1e-3)
    train(model, optimizer)
    count = round(0.125 * sum(p.numel() for p in matrices.values()))
    assert sum(len(state["indices"]) for state in optimizer.state.values()) == count
    sizes = torch.cat([before[name].abs().flatten() for name in matrices]).sort().values
    trained = 0
    for name, there in moved(model, before).items():
        assert not there.any() or name in matrices
        assert not (there & (before[name].abs() > sizes[count - 1])).any()
        trained += int(there.sum())
    assert trained > 0.99 * count


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("hft", {}, "hft trains whole matrices, and transformer.h.0.attn.c_attn holds several; choose sara"),
        ("s2ft", {"down_ratio": 0.1}, r"down_ratio: no block has a layer called, got \('down_proj', 'fc2'\)"),
        ("s2ft", {"down_ratio": 0.0, "v_ratio": 0.5}, r"v_ratio: no block has a layer called, got \('v_proj',\)"),
    ],
)
def test_what_gpt2_has_no_matrix_for_is_refused(name, keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        selection_groups(model_of("gpt2"), name, **keys)
