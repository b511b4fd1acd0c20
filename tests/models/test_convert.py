"""Models of transformers with their linear layers swapped, and swapped back."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from gracile.models.convert import convert, merge
from gracile.models.layers import FactoredLinear, LowRankLinear, SparseLowRankLinear

SIZES = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64),
}
LAYERS = {"low rank": (LowRankLinear, {"rank": 4}), "sltrain": (SparseLowRankLinear, {"rank": 4, "density": 0.1})}

by_family = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
by_layer = pytest.mark.parametrize(("layer", "keys"), LAYERS.values(), ids=LAYERS)


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def linears(model):
    return {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}


@by_family
@by_layer
def test_a_merged_model_loads_without_gracile(config, layer, keys, tmp_path):
    model = model_of(config)
    before, tokens = linears(model), torch.arange(40).view(2, 20)
    assert convert(model, layer, **keys) is model
    factored = [name for name, module in model.named_modules() if isinstance(module, layer)]
    assert len(factored) == len(before) - 1, "all but the output layer"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    logits = model(tokens).logits
    merge(model)
    assert linears(model) == before
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@by_family
def test_a_converted_model_trains(config):
    model = convert(model_of(config).train(), SparseLowRankLinear, rank=4)
    tokens = torch.arange(40).view(2, 20)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    names = {name for name, module in model.named_modules() if isinstance(module, SparseLowRankLinear)}
    assert {module.name for module in model.modules() if isinstance(module, SparseLowRankLinear)} == names


def test_patterns_choose():
    model = convert(model_of(CONFIGS["llama"]), LowRankLinear, ["q_proj", r".*\.1\.mlp\.up_proj"], rank=2)
    factored = {name for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    assert factored == {*(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)), "model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize(
    ("target_modules", "keys", "message"),
    [
        (
            ["q_proj", "gate_prj"],
            {"rank": 2},
            "'gate_prj' matches no trainable linear layer; did you mean 'gate_proj'?",
        ),
        ([], {"rank": 2}, "target_modules is empty"),
        (["("], {"rank": 2}, "not a regular expression"),
        (["attn", "mlp"], {"rank": 33}, "rank must be a whole number from 1 to 32 here, got 33"),
    ],
)
def test_what_is_refused_changes_nothing(target_modules, keys, message):
    model = model_of(CONFIGS["llama"])
    before = linears(model)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("?", r"\?")):
        convert(model, LowRankLinear, target_modules, **keys)
    assert linears(model) == before


def test_an_unknown_keyword():
    with pytest.raises(TypeError, match="densty"):
        convert(model_of(CONFIGS["llama"]), SparseLowRankLinear, rank=2, densty=0.1)


def test_dtype_device_and_mode_stay():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.bfloat16).eval()
    convert(model, SparseLowRankLinear, rank=2)
    layers = [module for module in model.modules() if isinstance(module, SparseLowRankLinear)]
    assert {(p.dtype, p.device.type) for layer in layers for p in layer.parameters()} == {(torch.bfloat16, "meta")}
    assert not any(layer.training for layer in layers)


def test_a_layer_with_two_names_stays_one():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared)})
    convert(model, LowRankLinear, ["one", "two"], rank=2)
    assert isinstance(model["one"][0], LowRankLinear)
    assert model["one"][0] is model["two"][0]
    merge(model)
    assert type(model["one"][0]) is nn.Linear
    assert model["one"][0] is model["two"][0]
