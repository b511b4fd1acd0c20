"""ReLoRA's layer: peft's LoRA until it is folded, and the same function after it."""

import peft
import torch
from torch import nn

from gracile.models.layers import ReLoRALinear
from gracile.models.layers.relora import _rounded


def made(m=12, n=9, rank=3, **keys):
    torch.manual_seed(0)
    layer = ReLoRALinear.from_linear(nn.Linear(n, m), rank=rank, alpha=6.0, **keys)
    nn.init.normal_(layer.B)
    return layer


def test_without_a_fold_it_is_peft_lora():
    layer = made()
    plain = nn.Linear(9, 12)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    adapted = peft.get_peft_model(nn.Sequential(plain), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    lora = adapted.base_model.model[0]
    with torch.no_grad():
        lora.lora_A.default.weight.copy_(layer.A)
        lora.lora_B.default.weight.copy_(layer.B)
    x = torch.randn(4, 9)
    torch.testing.assert_close(layer(x), adapted(x))
    layer(x).square().sum().backward()
    adapted(x).square().sum().backward()
    torch.testing.assert_close(layer.A.grad, lora.lora_A.default.weight.grad)
    torch.testing.assert_close(layer.B.grad, lora.lora_B.default.weight.grad)


def test_folding_leaves_the_function_and_starts_again():
    layer = made()
    x = torch.randn(4, 9)
    before, weight, A = layer(x), layer.weight.clone(), layer.A.clone()
    parameters = list(layer.parameters())
    layer.fold()
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    assert not layer.B.any()
    assert layer.A.any()
    assert not torch.equal(layer.A, A)
    assert torch.linalg.matrix_rank(layer.weight - weight) == 3
    assert all(one is other for one, other in zip(parameters, layer.parameters(), strict=True))
    layer(x).sum().backward()
    assert layer.B.grad.any(), "both factors zero would never move"
    assert not layer.A.grad.any()


def test_several_folds_are_of_higher_rank():
    layer = made()
    weight = layer.weight.clone()
    for _ in range(3):
        nn.init.normal_(layer.B)
        layer.fold()
    assert torch.linalg.matrix_rank(layer.weight - weight) == 9
    assert int(layer.folds) == 3


def test_what_is_drawn_is_the_same_on_every_process():
    layers = [made(seed=1, name="one"), made(seed=1, name="one"), made(seed=1, name="two"), made(seed=2, name="one")]
    torch.manual_seed(7)
    for layer in layers:
        layer.fold()
    assert torch.equal(layers[0].A, layers[1].A)
    assert not torch.equal(layers[0].A, layers[2].A)
    assert not torch.equal(layers[0].A, layers[3].A)
    resumed = made(seed=1, name="one")
    resumed.load_state_dict(layers[0].state_dict())
    for layer in (layers[0], resumed):
        layer.fold()
    assert torch.equal(layers[0].A, resumed.A), "goes on from the number of folds"


def test_dropout_is_for_training():
    layer = made(dropout=0.5)
    x = torch.randn(64, 9)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), layer.merge()(x), rtol=1e-5, atol=1e-5)


def test_small_updates_of_bf16_weights_are_not_lost():
    """Each is below half of a weight's last place: rounded to the nearest, all of them would be."""
    layer = ReLoRALinear(256, 256, rank=4, alpha=4.0, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.A.fill_(0.01)
        layer.B.fill_(0.01)
    small = 4 * layer.A[0, 0].double() * layer.B[0, 0].double()
    assert small < 2**-9
    layer.fold()
    mean = layer.weight.detach().double().mean() - 1
    deviation = (small * 2**-7) ** 0.5 / 256
    assert abs(mean - small) < 4 * deviation
    assert set(layer.weight.detach().flatten().tolist()) == {1.0, 1 + 2**-7}


def test_rounding_keeps_what_bf16_can_hold_and_what_is_not_finite():
    held = torch.tensor([1.0, -2.5, 0.0, torch.inf, -torch.inf, torch.nan, 2.0**-126])
    rounded = _rounded(held, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded, held.bfloat16(), rtol=0, atol=0, equal_nan=True)
