"""Methods beside peft's own, where peft can express them: the same numbers over 20 steps."""

import pytest
import torch
from adapted import TARGETS, attached, config_of, far, ids, llama
from peft import LoraConfig, PeftConfig, get_peft_model

from gracile import adapters


def run(model, steps=20):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        x = ids(seed=step)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loras(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def peft_lora(**keys):
    return get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **keys))


@torch.no_grad()
def test_lora():
    """AlignGuard without its terms, from the same factors."""
    own = attached("alignguard", pairs=1, l_a=0.0, l_t=0.0, l_c=0.0, alpha=8)
    theirs = peft_lora()
    held = loras(theirs)
    for layer in adapters.adapter_layers(own):
        held[layer.name].lora_A["default"].weight.copy_(layer.alignguard_A["default"])
    with torch.enable_grad():
        assert run(own) == pytest.approx(run(theirs), abs=1e-6)
    for layer in adapters.adapter_layers(own):
        assert far(held[layer.name].get_delta_weight("default"), layer.get_delta_weight("default")) < 1e-5


@torch.no_grad()
def test_pissa():
    """BA-LoRA without its terms; peft takes PiSSA's factors off the base, and here they are kept beside it."""
    own = attached("balora", consistency=0.0, diversity=0.0, leading=0.0)
    theirs = peft_lora(init_lora_weights="pissa")
    held = loras(theirs)
    for layer in adapters.adapter_layers(own):
        lora = held[layer.name]
        start = lora.get_delta_weight("default")
        assert far(layer.balora_B["default"] @ layer.balora_A["default"] * layer.scale("default"), start) < 1e-5
        signs = (lora.lora_A["default"].weight * layer.balora_A["default"]).sum(1).sign()  # an SVD leaves them open
        layer.balora_A["default"].mul_(signs[:, None])
        layer.balora_B["default"].mul_(signs)
    with torch.enable_grad():
        assert run(own) == pytest.approx(run(theirs), abs=1e-5)


def test_factors_of_pissa_and_sorsa_are_of_the_same_span():
    left = {layer.name: layer.sorsa_U["default"] for layer in adapters.adapter_layers(attached("sorsa"))}
    for layer in adapters.adapter_layers(attached("balora")):
        B = torch.linalg.qr(layer.balora_B["default"]).Q
        assert far((B.mT @ left[layer.name]).square().sum(), torch.tensor(4.0)) < 1e-4


def test_configurations_are_peft_files(tmp_path):
    for name in adapters.METHODS:
        config = config_of(name)
        config.save_pretrained(tmp_path / name)
        again = PeftConfig.from_pretrained(tmp_path / name)
        again.inference_mode = config.inference_mode
        assert type(again) is type(config)
        assert {**again.to_dict(), "peft_version": None} == {**config.to_dict(), "peft_version": None}
