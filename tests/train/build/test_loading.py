"""Weights that come into a model some modules at a time: those of the file, and nothing that is not said."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gracile.models import build_llama
from gracile.train.build import loading

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}


def llama(**more):
    return build_llama("2m", **SMALL, vocab_size=300, dtype=torch.bfloat16, **more)


@pytest.fixture(params=[1, 2**14, 2**28])
def at_once(request, monkeypatch):
    """Pieces of a module, of some, and of all."""
    monkeypatch.setattr(loading, "AT_ONCE", request.param)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_those_of_the_checkpoint(shard_size, tied, tmp_path):
    saved, model = llama(tie_word_embeddings=tied), llama(tie_word_embeddings=tied)
    saved.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert loading.has_weights(tmp_path)
    found = loading.load_weights(model, tmp_path)
    assert found.unexpected_keys == []
    assert found.missing_keys == (["lm_head.weight"] if tied else [])
    for (name, one), other in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.usefixtures("at_once")
def test_names_on_one_side_only_are_told(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    held = {"0.weight": torch.ones(4, 4), "1.bias": torch.ones(4), "2.weight": torch.ones(4, 4)}
    save_file(held, tmp_path / "model.safetensors")
    found = loading.load_weights(model, tmp_path)
    assert found == loading.Loaded(["0.bias", "1.weight"], ["2.weight"])
    assert model[0].weight.eq(1).all()


def test_no_piece_is_larger_than_what_is_looked_at_together(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "AT_ONCE", 2**14)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(9)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    sizes = [sum(tensor.nbytes for tensor in piece.values()) for piece in loading._pieces(tmp_path)]
    assert max(sizes) <= 2**14
    assert sum(sizes) == sum(p.nbytes for p in model.parameters())


def test_an_index_of_files_elsewhere_is_refused(tmp_path):
    index = {"weight_map": {"0.weight": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="names files outside of its folder"):
        loading.load_weights(nn.Linear(2, 2), tmp_path)
