"""A part of the weights through ``gracile finetune``: the others stay as they were, and runs go on to the same bits."""

import pytest
import torch
from helpers import interrupt, same, weights
from transformers import AutoModelForCausalLM

from gracile.train.finetune import main
from gracile.train.run import checkpoints

WAYS = {
    "s2ft": {"selection": "s2ft", "selection_args": {"down_ratio": 0.25}},
    "sara": {"selection": "sara", "selection_args": {"share": 0.125}},
    "hft": {"selection": "hft"},
    "hft, galore": {"selection": "hft", "optimizer": "galore_adamw", "rank": 4, "update_proj_gap": 3},
}


@pytest.mark.parametrize("name", WAYS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(name, short, tmp_path, metrics, base):
    whole, config = tmp_path / "run", short(**WAYS[name])
    assert main([config]) == 0
    told = metrics(whole)
    assert told["validation_loss"] < told["validation_loss_before"]
    first = checkpoints.checkpoints(whole)[-1].name
    broken = interrupt(whole, tmp_path / "again", keep=first)
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    assert metrics(broken)["history"] == told["history"]
    assert same(weights(broken), weights(whole))
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, whole))
    moved = {key: float((after[key] != before[key]).float().mean()) for key in before if "layers" in key}
    if name == "s2ft":
        assert {key for key, share in moved.items() if share} == {key for key in moved if "down_proj" in key}
        channels = [(after[key] != before[key]).any(0) for key in moved if "down_proj" in key]
        assert abs(float(torch.stack(channels).float().mean()) - 0.25) < 0.05
        assert told["trainable_parameters"] == 64 * sum(int(own.sum()) for own in channels), "columns, not matrices"
    elif name == "sara":
        assert 0.05 < sum(moved.values()) / len(moved) < 0.2
        matrices = [key for key in moved if before[key].dim() == 2]
        assert told["trainable_parameters"] == round(0.125 * sum(before[key].numel() for key in matrices))
    else:
        assert any(share == 0 for share in moved.values())
        assert any(share > 0.5 for share in moved.values())
    assert told["optimizer_state_bytes"] < told["adamw_state_bytes"] or "hft" in name


def test_small_weights_are_chosen_by_a_threshold(short, tmp_path, base):
    """Only the weights say how many there are: what is built without them beforehand asks nothing of them."""
    assert main([short(selection="sara", selection_args={"threshold": 0.005}, max_steps=2)]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, tmp_path / "run"))
    moved = [after[key] != before[key] for key in before if "mlp" in key]
    assert all(before[key][after[key] != before[key]].abs().max() < 0.005 for key in before if "mlp" in key)
    assert all(part.any() for part in moved)


def test_what_is_refused(refused):
    assert "selection 'half' is not known" in refused(selection="half")
    assert "down_rati is no field of selection s2ft; did you mean" in refused(
        selection="s2ft", selection_args={"down_rati": 0.1}
    )
    assert "leave one out" in refused(selection="s2ft", adapter="lora")
    assert "got optimizer galore_adamw; hft goes with any" in refused(
        selection="s2ft", selection_args={"down_ratio": 0.1}, optimizer="galore_adamw"
    )
    assert "need a selection: hft, s2ft, sara" in refused(selection_args={"share": 0.1})
