"""LoRA-SB: begins with the best change of rank r towards Adam's first step, between orthonormal factors."""

import pytest
import torch
from adapted import TARGETS, far, ids, llama, logits
from peft import get_peft_model

from gracile import adapters

BATCHES = [{"input_ids": ids(seed=i), "labels": ids(seed=i)} for i in range(2)]


def begun(**keys):
    base = llama()
    config = adapters.LoraSBConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM", lr=1e-3, **keys)
    adapters.calibrate(base, config, BATCHES)
    return get_peft_model(base, config), config


@pytest.mark.parametrize("start", ["sign", "gradient"])
@pytest.mark.parametrize("alpha", [None, 32])
def test_the_change_at_first(start, alpha):
    model, config = begun(start=start, alpha=alpha)
    for layer in adapters.adapter_layers(model):
        G = config.statistics[layer.name]
        step = -1e-3 * (G.sign() if start == "sign" else G)
        U, S, V = torch.linalg.svd(step, full_matrices=False)
        best = (U[:, :8] * S[:8]) @ V[:8]
        # a randomised decomposition of noise of full rank: as near as the best, not the same
        left = (step - layer.get_delta_weight("default")).norm()
        assert S[8:].norm() * (1 - 1e-5) <= left <= 1.01 * (step - best).norm()
        A, B = layer.lorasb_A["default"], layer.lorasb_B["default"]
        assert far(A @ A.mT, torch.eye(8)) < 1e-5
        assert far(B.mT @ B, torch.eye(8)) < 1e-5


def test_it_goes_down():
    base = llama()
    before = [base(**batch).loss.item() for batch in BATCHES]
    model, _ = begun()
    after = [model(**batch).loss.item() for batch in BATCHES]
    assert sum(after) < sum(before)


def test_the_gradient_that_the_weight_sees_is_projected():
    model, _ = begun(start="zero")
    assert far(logits(model), logits(llama())) < 1e-6
    layer = next(adapters.adapter_layers(model))
    x, dy = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    layer(x).backward(dy)
    A, B, G = layer.lorasb_A["default"], layer.lorasb_B["default"], dy.mT @ x
    assert far(B @ layer.lorasb_R["default"].grad @ A, B @ B.mT @ G @ A.mT @ A) < 1e-3


def test_the_same_from_the_same_seed():
    assert far(logits(begun()[0]), logits(begun()[0])) == 0
