"""Gradients that hooks see are those that autograd finds for the weights, and the model stays what it was."""

import pytest
import torch
from adapted import TARGETS, attached, config_of, far, ids, llama, logits

from gracile import adapters

BATCHES = [{"input_ids": ids(seed=i), "labels": ids(seed=i)} for i in range(3)]


def config(**keys):
    return adapters.LoraSBConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_gradient(dtype):
    model = llama(dtype=dtype).train()
    frozen = model.lm_head.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = adapters.calibrate(model, config(), BATCHES)
    assert found.calibrated
    assert model.training
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert sum(p.requires_grad for p in model.parameters()) == sum(1 for _ in model.parameters()) - 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    reference = llama(dtype=dtype)
    for batch in BATCHES:
        (reference(**batch).loss / len(BATCHES)).backward()
    assert len(found.statistics) == 2 * len(TARGETS)
    for name, G in found.statistics.items():
        expected = reference.get_submodule(name).weight.grad.float()
        assert far(G, expected) < (1e-6 if dtype == torch.float32 else 2e-2) * max(1.0, float(expected.abs().max()))


def test_the_usual_targets_of_a_model():
    found = adapters.calibrate(llama(), adapters.LoraSBConfig(r=4, task_type="CAUSAL_LM"), BATCHES[:1])
    assert {name.rpartition(".")[2] for name in found.statistics} == {"q_proj", "v_proj"}


def test_what_cannot_be_calibrated():
    with pytest.raises(ValueError, match="SorsaConfig starts from the weights alone"):
        adapters.calibrate(llama(), config_of("sorsa"), BATCHES)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        adapters.calibrate(llama(), config(), [])
    with pytest.raises(ValueError, match="batches must have labels"):
        adapters.calibrate(llama(), config(), [{"input_ids": ids()}])
    with pytest.raises(ValueError, match="target_modules must name linear layers"):
        adapters.calibrate(llama(), adapters.LoraSBConfig(target_modules=["nothing"]), BATCHES)


def test_without_it_a_method_that_needs_it_is_refused(monkeypatch):
    from peft import get_peft_model

    with pytest.raises(ValueError, match=r"call gracile.adapters.calibrate\(model, config, batches\)"):
        get_peft_model(llama(), config())
    empty = config(calibrated=True)
    with pytest.raises(ValueError, match="has nothing in it: its file was not loaded"):
        logits(get_peft_model(llama(), empty))
    logits(attached("lorasb"))
