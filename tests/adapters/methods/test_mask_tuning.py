"""Mask tuning: gradients pass straight through, agreeing ones are kept, and a finished mask is a bit a weight."""

import torch
from adapted import TARGETS, attached, far, llama, logits, train
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from gracile import adapters
from gracile.adapters.straight_through import packed_bits, unpacked_bits


def test_the_gradient_of_a_score():
    layer = next(adapters.adapter_layers(attached("masktuning")))
    x, dy = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    with torch.no_grad():
        layer.masktuning_p["default"][:3] = 0.0
    layer(x).backward(dy)
    assert far(layer.masktuning_p["default"].grad, (dy.mT @ x) * layer.base_layer.weight) < 1e-5
    off = layer.base_layer.weight.clone()
    off[:3] = 0
    assert far(layer(x), x @ off.mT) < 1e-5


def test_bits():
    for shape in ((3, 5), (8, 8), (1, 1), (17, 31)):
        mask = torch.rand(shape) > 0.5
        packed = packed_bits(mask)
        assert packed.dtype == torch.uint8
        assert packed.shape == (-(-mask.numel() // 8),)
        assert torch.equal(unpacked_bits(packed, shape), mask)


def test_a_finished_mask_is_a_bit_a_weight(tmp_path):
    config = adapters.MaskTuningConfig(target_modules=TARGETS, save_scores=False, task_type="CAUSAL_LM")
    model = train(get_peft_model(llama(), config), lr=2.5e-3)
    assert far(logits(model), logits(llama())) > 1e-3
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.uint8}
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert far(logits(again), logits(model)) == 0


def test_gradient_dropout():
    task = torch.tensor([1.0, 1.0, -1.0, 2.0])
    distance = torch.tensor([0.5, -1.0, -0.5, -0.5])
    p = torch.zeros(4, requires_grad=True)
    kept = torch.zeros(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        p.grad = None
        adapters.gradient_dropout((task * p).sum(), (distance * p).sum(), [p], generator=generator)
        assert ((p.grad == 0) | (p.grad == task)).all()
        kept += p.grad != 0
    share = kept / 2000
    assert share[0] == share[2] == 1, "where both agree"
    assert abs(share[1] - 0.5) < 0.05, "opposite and of one size"
    assert abs(share[3] - (1 + 1.5 / 2.5) / 2) < 0.05
    p.grad = None
    adapters.gradient_dropout((task * p).sum(), (distance * p).sum(), [p], level=0.0)
    assert torch.equal(p.grad, task)
