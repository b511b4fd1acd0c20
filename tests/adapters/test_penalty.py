"""Terms of the loss: once a step however that is split into passes, in training alone, and none of weight zero."""

import pytest
import torch
from adapted import attached, config_of, far, ids, llama, logits, train
from peft import get_peft_model
from torch.nn import functional as F

from gracile import adapters
from gracile.adapters.output_terms import (
    class_consistency,
    class_diversity,
    leading_share,
    token_consistency,
    token_entropy,
)
from gracile.adapters.penalty import base_logits


def loss_of(model, **more):
    return model(input_ids=ids(), labels=ids(), **more).loss


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_a_term_is_in_the_loss_of_training_alone(task):
    plain = attached("sorsa", gamma=0.0, task_type=task)
    with_it = attached("sorsa", gamma=2.0, task_type=task)
    for model in (plain, with_it):
        with torch.no_grad():
            for layer in adapters.adapter_layers(model):
                layer.sorsa_U["default"].mul_(1.1)
    term = adapters.penalty(with_it)
    assert term > 0.1
    assert abs(loss_of(with_it.train()) - loss_of(plain.train()) - term) < 1e-5
    assert abs(loss_of(with_it.eval()) - loss_of(plain.eval())) < 1e-6
    with torch.no_grad():
        assert abs(loss_of(with_it.train()) - loss_of(plain.train())) < 1e-6
    assert adapters.penalty(plain) is None
    with with_it.disable_adapter():
        assert adapters.penalty(with_it) is None


def test_it_is_shared_among_the_passes_of_a_step():
    model = attached("sorsa", gamma=1.0).train()
    with torch.no_grad():
        next(adapters.adapter_layers(model)).sorsa_U["default"].mul_(2)
    term, x = adapters.penalty(model), ids(4)
    model.eval()
    plain = [model(input_ids=part, labels=part, num_items_in_batch=torch.tensor(44)).loss for part in x.split(1)]
    model.train()
    passes = [model(input_ids=part, labels=part, num_items_in_batch=torch.tensor(44)).loss for part in x.split(1)]
    assert abs(sum(passes) - sum(plain) - term) < 1e-4


def test_the_bases_logits_are_the_bases():
    base = logits(llama())
    model = train(attached("balora"))
    model.train()
    found = base_logits(model.get_base_model(), (), {"input_ids": ids(), "labels": ids()})
    assert far(found, base) < 1e-6
    assert model.training
    assert far(logits(model), base) > 1e-3


def test_of_tokens():
    torch.manual_seed(0)
    z, base = torch.randn(10, 30), torch.randn(10, 30)
    p0, p = base.softmax(-1), z.softmax(-1)
    assert abs(token_consistency(z, base) - (p0 * (p0 / p).log()).sum(-1).mean()) < 1e-5
    assert abs(token_entropy(z) + (p * p.log()).sum(-1).mean()) < 1e-5
    z.requires_grad_()
    same = token_consistency(z, z.detach())
    same.backward()
    assert abs(same) < 1e-6
    assert z.grad.abs().max() < 1e-6


def test_of_classes():
    torch.manual_seed(0)
    z = torch.randn(12, 5)
    covariance = torch.cov(z.T)
    assert abs(class_diversity(z) - (covariance - covariance.diag().diag()).square().sum() / 5) < 1e-5
    assert class_consistency(3 * z, z) < 1e-12
    assert class_diversity(z[:1]) == 0


def test_the_leading_share():
    assert abs(leading_share(torch.outer(torch.randn(8), torch.randn(6)), 1) - 1) < 1e-5
    assert abs(leading_share(torch.eye(6), 3) - 0.5) < 1e-6
    assert torch.isfinite(leading_share(torch.zeros(4, 4), 2))
    assert leading_share(torch.randn(5000, 8), 8).item() == pytest.approx(1)


def test_factors_that_zero_3_has_put_away_are_named():
    model = attached("sorsa", gamma=1.0)
    away = next(adapters.adapter_layers(model)).sorsa_U["default"]
    away.data, away.ds_id, away.ds_numel = torch.empty(0), 0, 256
    with pytest.raises(ValueError, match="set stage3_param_persistence_threshold to at least 256, or use ZeRO 2"):
        adapters.penalty(model)


def test_padding_does_not_count():
    config = config_of("balora")
    torch.manual_seed(0)
    logits, base, labels = torch.randn(2, 6, 9), torch.randn(2, 6, 9), torch.randint(9, (2, 6))
    padded = [F.pad(t, (0, 0, 0, 3), value=7.0) for t in (logits, base)]
    found = config.of_outputs(*padded, F.pad(labels, (0, 3), value=-100))
    assert abs(found - config.of_outputs(logits, base, labels)) < 1e-6


def test_without_weights_ba_lora_asks_nothing_of_the_base():
    config = adapters.BALoraConfig(r=4, target_modules=["q_proj"], consistency=0.0, diversity=0.0, leading=0.0)
    model = get_peft_model(llama(), config).train()
    calls = []
    model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    loss_of(model)
    assert len(calls) == 1
