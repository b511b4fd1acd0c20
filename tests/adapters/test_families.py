"""Every method on models other than the LLaMA of the other tests: Qwen2 with biases and tied embeddings, Qwen3 with
norms in its attention and heads wider than its rows, both with fewer heads of keys and values; GPT-2, whose weights lie
inputs x outputs."""

import functools

import pytest
import torch
from adapted import CASES, far, ids, logits, train
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, Qwen3Config

from gracile import adapters

SIDES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
GROUPED = {"vocab_size": 64, "max_position_embeddings": 64, "num_key_value_heads": 2, "tie_word_embeddings": True}
CONFIGS = {
    "qwen2": Qwen2Config(**SIDES, **GROUPED),
    "qwen3": Qwen3Config(**SIDES, **GROUPED, head_dim=16),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64),
}
LLAMA_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PARTS = {"qwen2": LLAMA_PARTS, "qwen3": LLAMA_PARTS, "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")}
each = pytest.mark.parametrize("name", CASES)
thorough = pytest.mark.thorough
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


def base_of(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # which are zero at first
            torch.nn.init.normal_(p, std=0.02)
    return model


def config_of(name, family, base, **keys):
    case = CASES[name]
    keys = {"target_modules": list(PARTS[family]), "task_type": "CAUSAL_LM", **case.keys, **keys}
    config = case.config(**keys)
    if hasattr(config, "statistic"):
        adapters.calibrate(base, config, [{"input_ids": ids(seed=i), "labels": ids(seed=i)} for i in range(2)])
    return config


def attached(name, family, **keys):
    base = base_of(family)
    config = config_of(name, family, base, **keys)
    torch.manual_seed(5)
    return get_peft_model(base, config)


def losses_of(model, lr, steps=4):
    """Of a batch that is trained on."""
    losses, optimizer = [], torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = model.train()(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@functools.cache
def shapes_of(family):
    """m x n of each adapted layer."""
    found = {}
    for name, module in base_of(family).named_modules():
        if name.endswith(PARTS[family]):
            m, n = module.weight.shape
            found[name] = (n, m) if family == "gpt2" else (m, n)
    return found


@each
@pytest.mark.parametrize("family", ["qwen2", "gpt2", pytest.param("qwen3", marks=thorough)])
def test_the_verbs_on_another_family(name, family, tmp_path):
    case, base = CASES[name], base_of(family)
    before, weights = logits(base), {key: value.clone() for key, value in base.state_dict().items()}
    model = attached(name, family)
    shapes = shapes_of(family)
    layers = {layer.name: layer for layer in adapters.adapter_layers(model)}
    assert {key: (layer.out_features, layer.in_features) for key, layer in layers.items()} == shapes
    trained = case.in_common + sum(case.trained(m, n) for m, n in shapes.values())
    assert model.get_nb_trainable_parameters()[0] == trained
    moved = far(logits(model), before)
    assert moved <= 1e-5 if case.starts_exactly else 1e-5 < moved < 0.5

    losses = losses_of(model, case.lr)
    found = logits(model)
    assert far(found, before) > 1e-3
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model), before)

    model.save_pretrained(tmp_path / "adapter")
    assert far(logits(PeftModel.from_pretrained(base_of(family), tmp_path / "adapter")), found) <= 1e-6
    if case.is_low_rank:
        adapters.to_lora(model, tmp_path / "lora")
        assert far(logits(PeftModel.from_pretrained(base_of(family), tmp_path / "lora")), found) < 1e-5
    model.merge_adapter(safe_merge=True)
    assert far(logits(model), found) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(logits(model), found)
    merged = model.merge_and_unload()
    assert far(logits(merged), found) < 1e-5
    assert merged.state_dict().keys() == weights.keys()
    adapted = {f"{layer}.weight" for layer in shapes}
    assert all(torch.equal(value, weights[key]) for key, value in merged.state_dict().items() if key not in adapted)


@each
@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(name, marks=thorough) for name in ("qwen2", "qwen3"))])
def test_the_usual_targets_of_a_family_and_factors_that_are_made_anew(name, family, tmp_path):
    keys = {"target_modules": None, "save_projection": False}
    model = attached(name, family, **keys)
    usual = {layer.name.rpartition(".")[2] for layer in adapters.adapter_layers(model)}
    assert usual == ({"c_attn"} if family == "gpt2" else {"q_proj", "v_proj"})
    found = logits(train(model, lr=CASES[name].lr))
    model.save_pretrained(tmp_path)
    base, given = base_of(family), {}
    if hasattr(CASES[name].config, "statistic"):  # whose factors come from gradients
        with pytest.raises(ValueError, match="saved without its factors, which come from gradients"):
            PeftModel.from_pretrained(base_of(family), tmp_path)
        given["config"] = config_of(name, family, base, **keys)
    assert far(logits(PeftModel.from_pretrained(base, tmp_path, **given)), found) <= 1e-6
