"""Adapters of this package through ``gracile finetune``: begun from data where a method asks for it, stopped, gone on
with to the bit, merged."""

import json
from pathlib import Path

import peft
import pytest
import torch
from adapted import CASES
from helpers import interrupt, same, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gracile
from gracile.train.finetune import main
from gracile.train.run import checkpoints

CONFIGS = Path(gracile.__file__).parent / "configs" / "deepspeed"
ALWAYS = ("lorasb", "pst")
EACH = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.thorough) for name in CASES]


@pytest.mark.parametrize("name", [*EACH, "masktuning, gated"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(name, short, tmp_path, metrics, base):
    name, _, gated = name.partition(", ")
    given = {key: value for key, value in CASES[name].keys.items() if key not in ("total_steps", "sparsity")}
    if gated:
        given |= {"gradient_dropout": 1.0}
    if name == "pst":
        given |= {"total_steps": 8, "sparsity": 0.2, "warmup": 0.0}
    whole, config = tmp_path / "run", short(adapter=name, adapter_args=given)
    assert main([config]) == 0
    told = metrics(whole)
    assert told["validation_loss"] != told["validation_loss_before"]
    first = checkpoints.checkpoints(whole)[-1].name
    broken = interrupt(whole, tmp_path / "again", keep=first)
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    assert metrics(broken)["history"] == told["history"]
    assert same(weights(broken), weights(whole))
    files = [run / "adapter" / "adapter_model.safetensors" for run in (whole, broken)]
    assert same(*map(load_file, files))
    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole / "adapter")
    assert json.loads((whole / "adapter" / "adapter_config.json").read_text())["peft_type"] == name.upper()
    assert type(tuned.peft_config["default"]) is CASES[name].config


def test_what_is_calibrated_on(refused):
    assert "give forgetting_dataset" in refused(adapter="alignguard", forgetting_dataset=None)
    assert "calibration_examples has no effect with adapter sorsa" in refused(adapter="sorsa", calibration_examples=4)
    assert "need an adapter that starts from gradients" in refused(calibration_examples=4)
    assert "calibration_examples must be at least 1, got 0" in refused(adapter="lorasb", calibration_examples=0)
    assert "lorasb takes no 'calibrated'" in refused(adapter="lorasb", adapter_args={"calibrated": True})
    assert "r must be a whole number >= 1, got 0" in refused(adapter="sorsa", adapter_args={"r": 0})
    said = refused(adapter="masktuning", adapter_args={"gradient_dropout": 2})
    assert "gradient_dropout must be a number in [0, 1], got 2" in said
    keys = {"adapter": "masktuning", "adapter_args": {"gradient_dropout": 1.0}}
    assert "use FSDP2 or DDP" in refused(adapter="allora", deepspeed=str(CONFIGS / "zero2.json"))
    said = refused(**keys, deepspeed=str(CONFIGS / "zero2.json"))
    assert "gradient_dropout gates whole gradients, which DeepSpeed and FSDP split; use DDP" in said


def test_terms_are_in_a_smoothed_loss_too(short, tmp_path, metrics):
    """Which the Trainer computes, and not the model; what is evaluated has none."""
    told = {}
    for gamma in (0.0, 100.0):
        out = tmp_path / str(gamma)
        config = short(
            adapter="sorsa", adapter_args={"r": 4, "gamma": gamma}, label_smoothing_factor=0.1, max_steps=4,
            gradient_accumulation_steps=2, save_strategy="no", output_dir=str(out), forgetting_dataset=None,
        )  # fmt: skip
        assert main([config]) == 0
        held = load_file(out / "adapter" / "adapter_model.safetensors")
        told[gamma] = sum((U.T @ U - torch.eye(4)).norm().item() for key, U in held.items() if "sorsa_U" in key)
        told[gamma, "before"] = metrics(out)["validation_loss_before"]
    assert told[100.0] < 0.5 * told[0.0]
    assert told[100.0, "before"] == told[0.0, "before"]
