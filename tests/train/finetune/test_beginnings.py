"""peft's LoRA that begins with data, through ``gracile finetune``: unchanged at first, stopped and gone on with to the
bit, and saved for the base as it is."""

import peft
import pytest
import torch
from helpers import interrupt, same, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gracile.train.finetune import main
from gracile.train.run import checkpoints

FROM_DATA = ("eva", "corda", "lora_ga")
TOKENS = torch.arange(30).view(2, 15)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(TOKENS).logits


def lora(beginning, **more):
    return {"adapter": "lora", "adapter_args": {"r": 4, "init_lora_weights": beginning, **more}}


@pytest.mark.parametrize("rslora", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("beginning", FROM_DATA)
def test_a_run_is_that_of_its_beginning_and_is_saved_for_the_base(beginning, rslora, short, tmp_path, metrics, base):
    whole, config = tmp_path / "run", short(**lora(beginning, use_rslora=rslora), calibration_examples=16)
    assert main([config]) == 0
    told = metrics(whole)
    untouched = AutoModelForCausalLM.from_pretrained(base)
    before = logits(untouched)
    merged = logits(AutoModelForCausalLM.from_pretrained(whole))
    assert (merged - before).norm() > 0.05 * before.norm()
    loaded = logits(peft.PeftModel.from_pretrained(untouched, whole / "adapter"))
    torch.testing.assert_close(loaded, merged, rtol=1e-4, atol=1e-5)

    # of the base, and of what was merged: a plain LoRA changes nothing at first
    for model, loss in ((base, "validation_loss_before"), (str(whole), "validation_loss")):
        plain = short(model=model, adapter="lora", adapter_args={"r": 4}, max_steps=1)
        assert main([plain, "--output_dir", str(tmp_path / loss)]) == 0
        assert metrics(tmp_path / loss)["validation_loss_before"] == pytest.approx(told[loss], abs=1e-5)

    first = checkpoints.checkpoints(whole)[-1].name
    config = short(**lora(beginning, use_rslora=rslora), calibration_examples=16)
    broken = interrupt(whole, tmp_path / "again", keep=first)
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    assert metrics(broken)["history"] == told["history"]
    assert same(weights(broken), weights(whole))


@pytest.mark.parametrize("beginning", ["corda", "lora_ga"])
def test_an_adapter_without_its_first_factors_is_no_start(beginning, short, tmp_path, capsys):
    """Of a checkpoint: peft loads LoRA-GA's onto a base that still has what was taken off."""
    assert main([short(**lora(beginning), calibration_examples=8, max_steps=3)]) == 0
    held = checkpoints.checkpoints(tmp_path / "run")[-1]
    more = short(adapter_from=str(held), max_steps=1)
    assert main([more, "--output_dir", str(tmp_path / "more")]) == 2
    assert f"it began with init_lora_weights {beginning}" in capsys.readouterr().err
    good = short(adapter_from=str(tmp_path / "run" / "adapter"), max_steps=1)
    assert main([good, "--output_dir", str(tmp_path / "good")]) == 0


def test_factors_begin_with_what_the_data_says(short, tmp_path, base):
    """Other examples, other factors; and ranks that EVA shares out over the layers."""
    found = []
    for count in (4, 48):
        folder = tmp_path / str(count)
        config = short(**lora("eva"), calibration_examples=count, learning_rate=1e-12, max_steps=1)
        assert main([config, "--output_dir", str(folder)]) == 0
        found.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    shapes = [{key: value.shape for key, value in one.items()} for one in found]
    assert any(
        not torch.equal(found[0][key], found[1][key]) for key in found[0] if shapes[0][key] == shapes[1].get(key)
    )
    assert len({value.shape[0] for key, value in found[1].items() if "lora_A" in key}) > 1


def test_what_does_not_go_together(refused):
    assert "use_dora does not go with init_lora_weights corda" in refused(**lora("corda", use_dora=True))
    assert "rank_pattern does not go with" in refused(**lora("lora_ga", rank_pattern={"q_proj": 2}))
    assert "does not let it; choose eva" in refused(**lora("corda"), quantize="4bit")
    assert "calibration_examples has no effect with adapter lora" in refused(
        adapter="lora", adapter_args={"r": 4}, calibration_examples=4
    )
    assert "eva_config takes no 'rhoo'; did you mean 'rho'?" in refused(**lora("eva", eva_config={"rhoo": 1}))
