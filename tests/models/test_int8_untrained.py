"""New models in 8 bits: the ordinary ones of the same seed, made and saved a layer at a time."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from gracile.int8_weight import Int8Weight
from gracile.models import build_llama, int8
from gracile.models.int8 import KINDS, dequantize_weights, quantize_weights
from gracile.models.int8_export import save_dequantized
from gracile.models.int8_untrained import build_int8

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def llama(tied=False, dtype=torch.bfloat16):
    return build_llama("2m", **SMALL, vocab_size=300, dtype=dtype, tie_word_embeddings=tied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_those_of_the_ordinary_model_of_the_seed(tied, dtype):
    torch.manual_seed(3)
    wanted, after = quantize_weights(llama(tied, dtype)), torch.rand(1)
    torch.manual_seed(3)
    made, same_after = build_int8(lambda: llama(tied, dtype)), torch.rand(1)
    assert torch.equal(after, same_after)
    theirs, own = wanted.state_dict(), made.state_dict()
    assert own.keys() == theirs.keys()
    assert not [name for name in own if not torch.equal(own[name], theirs[name])]
    assert (made.lm_head.weight is made.model.embed_tokens.weight) is tied
    ids = torch.arange(12)[None]
    assert torch.equal(made(ids).logits, wanted(ids).logits)


def test_one_layer_at_a_time_is_wider(monkeypatch):
    """Of those whose weights may be in 8 bits."""
    given, wide = int8.quantize, []

    def quantize(weight, group_size):
        held = [m for m in model[0].modules() if type(m) in KINDS and not m.weight.is_meta] if model else []
        wide.append(len(held))
        return given(weight, group_size)

    model = []

    def build():
        model.append(llama())
        return model[0]

    monkeypatch.setattr(int8, "quantize", quantize)
    build_int8(build)
    assert wide == [1] * (2 + 7 * SMALL["num_hidden_layers"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [2**31, 2**14])
def test_what_is_saved_is_the_ordinary_model(shard_bytes, tied, tmp_path):
    model = quantize_weights(llama(tied))
    save_dequantized(model, _made(tmp_path / "streamed"), shard_bytes)
    assert isinstance(model.lm_head.weight, Int8Weight)
    dequantize_weights(copy.deepcopy(model)).save_pretrained(tmp_path / "whole")
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("streamed", "whole"))
    assert type(one) is type(other)
    assert one.dtype == other.dtype == torch.bfloat16
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "whole")]
    assert configs[0] == configs[1]
    files = sorted((tmp_path / "streamed").glob("model*.safetensors"))
    assert (len(files) > 1) is (shard_bytes < 2**31)
    largest = max(p.nbytes for p in one.parameters())
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= max(shard_bytes, largest)


def _made(folder):
    folder.mkdir()
    return folder


def test_buffers_that_are_saved_are_saved_as_they_are(tmp_path):
    model = quantize_weights(llama())
    model.model.register_buffer("places", torch.arange(3))
    model.model.register_buffer("passing", torch.arange(3), persistent=False)
    model.model.norm.bias = nn.Parameter(torch.ones(2))
    save_dequantized(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["model.places"].tolist() == [0, 1, 2]
    assert saved["model.norm.bias"].tolist() == [1, 1]
    assert "model.passing" not in saved
