"""ALLoRA: rows of zeros learn by eta, and the slower the larger they are."""

import pytest
import torch
from adapted import attached, ids, train
from torch import nn

from gracile import adapters
from gracile.adapters.methods.allora import refuse_engines, row_rates


def test_rates():
    rows = torch.cat([torch.zeros(1, 6), torch.eye(6)[:3] * torch.tensor([0.1, 1.0, 10.0])[:, None]])
    rates = row_rates(rows, eta=2.0).flatten()
    assert rates[0] == 2
    assert (rates.diff() < 0).all()
    assert torch.allclose(rates[1:], (torch.tensor([0.1, 1.0, 10.0]) + 0.25).rsqrt())


def step(model, optimizer):
    x = ids()
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_is_the_optimizers_by_the_rate_of_each_row(kind):
    own, plain = attached("allora", eta=3.0).train(), attached("allora", eta=3.0).train()
    for layer in adapters.adapter_layers(plain):  # without its events: LoRA
        layer.on_step = lambda *_: None
        layer.before_step = lambda *_: None
    optimizers = [kind([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in (own, plain)]
    for _ in range(2):
        before = [p.detach().clone() for p in own.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, at in zip((p for p in plain.parameters() if p.requires_grad), before, strict=True):
                p.copy_(at)
        for model, optimizer in zip((own, plain), optimizers, strict=True):
            step(model, optimizer)
        moved = zip(own.parameters(), plain.parameters(), strict=True)
        for at, (p, q) in zip(before, [(p, q) for p, q in moved if p.requires_grad], strict=True):
            expected = row_rates(at, 3.0) * (q - at)
            assert torch.allclose(p - at, expected, rtol=1e-3, atol=1e-7)


def test_the_first_step_of_b_is_eta_times_the_learning_rate():
    model = attached("allora", eta=2.0)
    train(model, 1, lr=1e-3)
    for layer in adapters.adapter_layers(model):
        B = layer.allora_B["default"].detach()
        assert B.abs().median() == pytest.approx(2e-3, rel=1e-3)
        assert B.abs().max() < 2.001e-3


def test_flat_copies_are_refused():
    p = nn.Parameter(torch.zeros(2, 2))
    refuse_engines(p)
    p._hp_mapping = object()
    with pytest.raises(ValueError, match="DeepSpeed steps flat copies; use FSDP2 or DDP"):
        refuse_engines(p)
