"""SparseLoRA: LoRA where nothing is left out, the chosen channels' own gradients where something is."""

import pytest
import torch
from adapted import far, ids, logits
from sparsely import MLP, labels, lora, step
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gracile.adapters import SparseLora, SparseLoraCallback

SIDES = MLP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_channels_it_is_lora(dtype):
    out, grads = step(lora(dtype=dtype))
    model = lora(dtype=dtype)
    sparse = SparseLora(model, 0.0)
    found, own = step(model)
    assert not sparse.kept
    assert torch.equal(found.logits, out.logits)
    assert all(torch.equal(own[name], grads[name]) for name in grads)


def masked(model, sparse, x, with_labels):
    """Dense MLPs, of which the channels that were not chosen are zero for tokens without labels."""

    def forward(mlp, kept):
        def run(h):
            inner = mlp.act_fn(mlp.gate_proj(h)) * mlp.up_proj(h)
            on = torch.zeros(inner.shape[-1])
            on[kept] = 1
            return mlp.down_proj(torch.where(with_labels[..., None], inner, inner * on))

        return run

    for name, mlp in model.named_modules():
        if name in sparse:
            mlp.forward = forward(mlp, sparse[name])


@pytest.mark.parametrize("targets", [SIDES, ["gate_proj"], ["down_proj", "q_proj"]])
@pytest.mark.parametrize("share", [0.25, 0.9])
def test_the_gradient_is_that_of_the_channels_that_were_chosen(share, targets):
    model = lora(targets)
    sparse = SparseLora(model, share)
    out, grads = step(model)
    assert {len(kept) for kept in sparse.kept.values()} == {round((1 - share) * 128)}
    reference, x = lora(targets), ids()
    masked(reference, sparse.kept, x, labels(x) != -100)
    expected, theirs = step(reference)
    assert far(out.logits, expected.logits) < 1e-5
    assert grads.keys() == theirs.keys()
    for name, grad in grads.items():
        assert far(grad, theirs[name]) < 1e-5, name
    dense, _ = step(lora(targets))
    assert far(out.logits, dense.logits) > 1e-3


def test_a_predictor_of_full_rank_finds_the_largest_channels():
    model = lora()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    sparse = SparseLora(model, 0.75, rank=64)
    seen = {}
    for name, mlp in model.named_modules():
        if name.endswith("mlp"):
            mlp.register_forward_pre_hook(lambda mlp, args, name=name: seen.update({name: args[0].detach()}))
    x = ids()
    model(input_ids=x, labels=labels(x))
    for name, kept in sparse.kept.items():
        mlp, h = model.get_submodule(name), seen[name][labels(x) == -100]
        sizes = (mlp.act_fn(mlp.gate_proj(h)) * mlp.up_proj(h)).norm(dim=0)
        assert torch.equal(kept, sizes.topk(32).indices.sort().values)


def test_evaluation_steps_and_removal():
    model, plain = lora(), lora()
    expected = logits(plain)
    sparse = SparseLora(model, {"layers.1.mlp": 0.8}, start_step=2, end_step=4)
    model.train()
    on = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    for _ in range(6):
        sparse.kept.clear()
        step(model)
        optimizer.step()
        other.step()
        on.append(list(sparse.kept))
    name = "base_model.model.model.layers.1.mlp"
    assert on == [[], [], [name], [name], [], []]
    sparse.steps = 2
    assert far(logits(model), expected) == 0, "evaluation is dense"
    SparseLoraCallback(sparse).on_step_begin(None, type("State", (), {"global_step": 7}), None)
    assert sparse.steps == 7
    sparse.steps = 2
    sparse.remove()
    model.train()
    sparse.kept.clear()
    step(model)
    assert not sparse.kept


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\), got 1"):
        SparseLora(lora(), 1)
    with pytest.raises(ValueError, match=r"sparsity must name MLPs of the model, got 'layers.7.mlp'"):
        SparseLora(lora(), {"layers.7.mlp": 0.5})
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="model must have MLPs with gate_proj, up_proj and down_proj, got 'GPT2LMHead"):
        SparseLora(gpt, 0.5)
