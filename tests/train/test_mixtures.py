"""Mixtures of experts, from transformers, through the command: trained, saved, resumed, planned."""

import shutil

import pytest
import torch
from helpers import same, weights
from mixtures import MIXTURES, build_mixture
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gracile.optim import state_bytes
from gracile.optim.memory import planned_state_by_kind
from gracile.train.pretrain import main
from gracile.train.run import trainer


@pytest.fixture(scope="module")
def tokenizer(tiny_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    assert main([tiny_in(folder, max_steps=1)]) == 0
    return folder / "run"


@pytest.fixture
def mixture(tiny, tmp_path, tokenizer):
    """Writes a saved mixture and the settings of a run that begins with it; for the settings' path."""

    def write(kind, **changes):
        build_mixture(kind, vocab_size=400).save_pretrained(tmp_path / kind)
        keys = {"model": str(tmp_path / kind), "model_overrides": None, "tokenizer": str(tokenizer)}
        return tiny(**keys, **{"max_steps": 6, "save_steps": 3, "update_proj_gap": 2, **changes})

    return write


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_resumes_to_the_same_bits_and_loads_elsewhere(kind, mixture, tmp_path, monkeypatch, capsys):
    built = []
    build = trainer.build_optimizer
    monkeypatch.setattr(trainer, "build_optimizer", lambda *a: built.append(build(*a)) or built[-1])
    config, run = mixture(kind), tmp_path / "run"
    assert main([config]) == 0
    whole = weights(run)
    assert any(".experts." in name for name in load_file(run / "checkpoint-3" / "model.safetensors"))
    assert state_bytes(built[0]) == planned_state_by_kind(built[0]).total()
    shutil.rmtree(run / "checkpoint-6")
    assert main([config, "--resume_from_checkpoint", "auto"]) == 0
    assert same(whole, weights(run))
    loaded = AutoModelForCausalLM.from_pretrained(run / "checkpoint-6").state_dict()
    final = AutoModelForCausalLM.from_pretrained(run).state_dict()
    assert loaded.keys() == final.keys()
    assert all(torch.equal(value, final[key]) for key, value in loaded.items())
    moved = [key for key, value in final.items() if ".experts." in key and value.dim() == 3]
    start = build_mixture(kind, vocab_size=400).state_dict()
    assert moved
    assert all(not torch.equal(final[key][e], start[key][e]) for key in moved for e in range(len(final[key])))


def test_weights_that_a_checkpoint_has_not_are_not_taken_from_the_start(mixture, tmp_path, capsys):
    """The Trainer warns, and goes on."""
    config, run = mixture("mixtral"), tmp_path / "run"
    assert main([config]) == 0
    shutil.rmtree(run / "checkpoint-6")
    file = run / "checkpoint-3" / "model.safetensors"
    held = load_file(file)
    name = next(key for key in held if ".experts." in key)
    held[f"{name}.0"] = held.pop(name)
    save_file(held, file, {"format": "pt"})
    (run / "checkpoint-3" / "manifest.json").unlink(missing_ok=True)
    trainer.checkpoints.seal(run / "checkpoint-3")
    assert main([config, "--resume_from_checkpoint", "auto"]) == 2
    assert f"weights are not those of this model: {name}.0 is on one side only" in capsys.readouterr().err


LAYERED = {
    "gpt_oss": {"layer": "sst", "optimizer": "sst_adamw", "optimizer_args": {"swap_every": 2}},
    "mixtral": {"layer": "sltrain", "optimizer": "sltrain_adamw"},
    "qwen3_moe": {"layer": "nm", "optimizer": "sr_ste_adamw"},
    "deepseek_v3": {"layer": "relora", "optimizer": "relora_adamw", "optimizer_args": {"merge_every": 2}},
}
FIRST, *OTHERS = LAYERED


@pytest.mark.parametrize("kind", [FIRST, *(pytest.param(kind, marks=pytest.mark.thorough) for kind in OTHERS)])
def test_experts_as_layers_are_trained_resumed_planned_and_merged(kind, mixture, tmp_path, monkeypatch, capsys):
    built = []
    build = trainer.build_optimizer
    monkeypatch.setattr(trainer, "build_optimizer", lambda *a: built.append(build(*a)) or built[-1])
    targets = {"target_modules": ["attn", "experts"], "rank": 4, "update_proj_gap": None}
    config, run = mixture(kind, **targets, **LAYERED[kind]), tmp_path / "run"
    assert main([config]) == 0
    whole = weights(run)
    held = load_file(run / "checkpoint-3" / "model.safetensors")
    assert any(".experts.gate_up_proj_layers.3." in name for name in held)
    assert state_bytes(built[0]) == planned_state_by_kind(built[0]).total()
    shutil.rmtree(run / "checkpoint-6")
    assert main([config, "--resume_from_checkpoint", "auto"]) == 0
    assert same(whole, weights(run))
    final = AutoModelForCausalLM.from_pretrained(run).state_dict()
    start = build_mixture(kind, vocab_size=400).state_dict()
    assert {name: value.shape for name, value in final.items()} == {name: value.shape for name, value in start.items()}
    moved = [key for key, value in final.items() if ".experts." in key and value.dim() == 3]
    assert all(not torch.equal(final[key][e], start[key][e]) for key in moved for e in range(len(final[key])))
