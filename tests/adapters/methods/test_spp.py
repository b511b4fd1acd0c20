"""SPP: a pruned weight keeps its zeros, also 2:4 ones, through training, merging and bf16."""

import pytest
import torch
from adapted import CASES, TARGETS, far, llama, logits, train
from peft import get_peft_model

from gracile import adapters


def pruned(dtype=torch.float32):
    """Two of four weights in each group are zero."""
    model = llama(dtype=dtype)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in TARGETS:
                groups = module.weight.view(-1, 4)
                groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0.0)
    return model


def adapted(dtype=torch.float32, **keys):
    return get_peft_model(pruned(dtype), adapters.SPPConfig(**{**CASES["spp"].keys, "target_modules": TARGETS, **keys}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay(dtype):
    model = train(adapted(dtype))
    before = logits(model)
    merged = model.merge_and_unload()
    assert far(logits(merged), before) < (1e-5 if dtype == torch.float32 else 0.1)
    for (name, module), own in zip(merged.named_modules(), pruned(dtype).modules(), strict=True):
        if name.rpartition(".")[2] in TARGETS:
            assert torch.equal(module.weight == 0, own.weight == 0)
            assert not torch.equal(module.weight, own.weight)
            assert (module.weight.view(-1, 4) != 0).sum(1).max() == 2


@pytest.mark.parametrize("r", [1, 5, 8, 32])
def test_the_change_is_a_hadamard_product(r):
    for layer in adapters.adapter_layers(adapted(r=r, alpha=2)):
        Wa, Wb, m = layer.spp_Wa["default"], layer.spp_Wb["default"], layer.out_features
        with torch.no_grad():
            Wb.normal_()
        rows = [min(i * r // m, r - 1) for i in range(m)]
        groups = torch.nn.functional.one_hot(torch.tensor(rows), r).float()
        hira = layer.base_layer.weight * ((groups * Wb[:, None]) @ Wa)  # W * (B A), as HiRA has it
        assert far(layer.get_delta_weight("default"), 2 / r * hira) < 1e-6
        sizes = groups.sum(0)
        assert sizes.max() - sizes.min() <= 1


def test_the_first_gradient_is_that_of_the_rows():
    model = adapted()
    layer = next(adapters.adapter_layers(model))
    layer(torch.randn(3, layer.in_features)).sum().backward()
    assert layer.spp_Wa["default"].grad.abs().max() == 0
    assert layer.spp_Wb["default"].grad.abs().max() > 0
