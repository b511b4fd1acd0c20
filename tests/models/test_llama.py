import json
from pathlib import Path

import pytest
import torch

from gracile.models import SIZES, build_llama, llama_config

SHARED_SIZES = Path(__file__).parents[3] / "shared" / "data" / "llama_sizes.json"


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_about_the_parameters_of_its_name(size):
    model = build_llama(size, device="meta")
    unit = {"m": 1e6, "b": 1e9}[size[-1]]
    # The names of the papers are loose: their 350m has 368M, their 1b 1.34B parameters.
    assert 0.85 <= count(model) / (float(size[:-1]) * unit) <= 1.35
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("size", ["2m", "60m"])
def test_parameters_are_counted_by_hand(size):
    d = SIZES[size]
    h, f, layers, vocabulary = (d[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    assert count(build_llama(size, device="meta")) == 2 * vocabulary * h + layers * (4 * h * h + 3 * h * f + 2 * h) + h


def test_dtype_overrides_and_forward():
    model = build_llama("2m", dtype=torch.bfloat16, num_hidden_layers=1, vocab_size=300)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(model.model.layers) == 1
    tokens = torch.arange(10)[None]
    output = model(input_ids=tokens, labels=tokens)
    assert output.logits.shape == (1, 10, 300)
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize(
    ("size", "overrides", "words"),
    [
        ("61m", {}, ["'61m'", "did you mean '71m'"]),
        ("2m", {"hiden_size": 3}, ["hiden_size", "3", "'hidden_size'"]),
        ("2m", {"num_attention_heads": 5}, ["attention heads", "5"]),
    ],
)
def test_bad_sizes_and_fields(size, overrides, words):
    with pytest.raises(ValueError) as error:
        llama_config(size, **overrides)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not SHARED_SIZES.is_file(), reason="the source of the dimensions lies beside the repository")
def test_dimensions_are_those_of_their_source():
    for size, fields in json.loads(SHARED_SIZES.read_text()).items():
        fields["max_position_embeddings"] = fields.pop("max_sequence_length")
        assert SIZES[size] == fields
