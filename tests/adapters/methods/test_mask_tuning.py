"""Mask tuning: gradients pass straight through, agreeing ones are kept, and a finished mask is a bit a weight."""

import pytest
import torch
from adapted import TARGETS, attached, far, ids, llama, logits, train
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F

from gracile import adapters
from gracile.adapters.straight_through import packed_bits, unpacked_bits
from gracile.rng import generator_of


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


def regularised(level=1.0, **keys):
    config = adapters.MaskTuningConfig(target_modules=TARGETS, gradient_dropout=level, task_type="CAUSAL_LM", **keys)
    model = get_peft_model(llama(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapters.adapter_layers(model):
            p = layer.masktuning_p["default"]
            p.mul_(torch.rand(p.shape, generator=generator) + 0.25)  # a quarter is off
    return model.train()


def gated_by_hand(level, x, labels):
    """By ``gradient_dropout`` of the losses of the whole step."""
    model, base, valid = regularised(), llama(), labels[:, 1:] != -100
    rows, layers = model(input_ids=x).logits[:, :-1][valid], list(adapters.adapter_layers(model))
    loss = F.cross_entropy(rows, labels[:, 1:][valid])
    p, p0 = rows.softmax(-1), base(input_ids=x).logits[:, :-1][valid].softmax(-1)
    distance = (p0 * (p0.log() - p.log())).sum(-1).mean()
    for layer in layers:
        generator = generator_of("gradient_dropout", 0, layer.name, 1)
        held = [layer.masktuning_p["default"]]
        of_task = torch.autograd.grad(loss, held, retain_graph=True)[0]
        of_distance = torch.autograd.grad(distance, held, retain_graph=True)[0]
        agreement = (1 + of_task.sign() * (of_task + of_distance) / (of_task.abs() + of_distance.abs() + 1e-8)) / 2
        kept = agreement > torch.rand(of_task.shape, generator=generator)
        yield ((1 - level) + level * kept) * of_task


def step(model):
    """The gradients that an optimizer is given."""
    held = [layer.masktuning_p["default"] for layer in adapters.adapter_layers(model)]
    torch.optim.SGD(held, lr=0.0).step()
    return [p.grad for p in held]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("own", [False, True], ids=["loss of the model", "own loss"])
@pytest.mark.parametrize("level", [1.0, 0.3])
def test_the_gradient_that_is_gated_is_that_of_a_step(count, own, level):
    x = ids(4)
    labels = x.clone()
    for row, first in enumerate((9, 7, 4, 1)):
        labels[row, :first] = -100
    total, model = (labels[:, 1:] != -100).sum(), regularised(level)
    for part, said in zip(x.chunk(count), labels.chunk(count), strict=True):
        if own:
            outputs = model(input_ids=part)
            loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), said[:, 1:].flatten(), reduction="sum") / total
            loss = adapters.with_penalty(model, loss, outputs, said, total)
        else:
            loss = model(input_ids=part, labels=said, num_items_in_batch=total).loss
        loss.backward()
    dropped = 0.0
    for found, expected in zip(step(model), gated_by_hand(level, x, labels), strict=True):
        same = torch.isclose(found, expected, rtol=1e-3, atol=1e-7)
        assert same.float().mean() > 0.999  # a rounding may lie on the other side of what was drawn
        dropped += float((found == 0).sum())
    assert (dropped > 100) is (level == 1.0)


def test_a_step_without_a_distance_is_refused():
    model = regularised()
    model(input_ids=ids()).logits.mean().backward()
    with pytest.raises(ValueError, match="gradient_dropout needs the outputs of the passes of a step"):
        step(model)
    with pytest.raises(ValueError, match=r"gradient_dropout must be a number in \[0, 1\], got 2"):
        regularised(2)


def test_with_checkpointed_activations_it_is_the_same():
    found = []
    for checkpointed in (False, True):
        model = regularised()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        model(input_ids=ids(), labels=ids()).loss.backward()
        found.append(step(model))
    assert all(far(a, b) < 1e-7 for a, b in zip(*found, strict=True))
