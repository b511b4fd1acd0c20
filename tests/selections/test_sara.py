"""SaRA: which weights are trained, how they are chosen anew, and what published code does otherwise."""

import copy

import pytest
import torch
from selected_models import llama, loss_of, moved, train, weights_of
from torch import nn

from gracile.optim import SparseAdamW
from gracile.selections import SaRA, selection_groups, threshold_of

THRESHOLD = 4e-3


def matrices(model):
    return {name: p for name, p in model.named_parameters() if "proj" in name}


def test_the_small_weights_of_matrices_move_and_nothing_else():
    """Norms and biases are not chosen from, as in the authors' code; nor does the first pass see other signs."""
    model = llama(attention_bias=True)
    loss, before = loss_of(model).detach(), weights_of(model)
    optimizer = SparseAdamW(selection_groups(model, "sara", threshold=THRESHOLD), lr=1e-3, weight_decay=0.1)
    assert torch.equal(loss_of(model), loss)
    train(model, optimizer)
    names = {name for name in matrices(model) if name.endswith("weight")}
    for name, there in moved(model, before).items():
        small = before[name].abs() < THRESHOLD
        assert not there.any() or name in names
        assert not (there & ~small).any()
        if name in names:
            assert there.sum() > 0.99 * small.sum()
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, nn.Parameter)
    assert model.state_dict().keys() == llama(attention_bias=True).state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.7, 1.0])
def test_a_share_is_the_least_threshold_of_all_matrices_together(dtype, share):
    generator = torch.Generator().manual_seed(0)
    held = [(0.1 * i * torch.randn(30, 20 + i, generator=generator)).to(dtype) for i in range(1, 5)]
    sizes = torch.cat([W.flatten() for W in held]).float().abs().sort().values
    threshold = threshold_of(held, share)
    last = sizes[round(share * len(sizes)) - 1]
    assert (sizes < threshold).sum() == (sizes <= last).sum() >= round(share * len(sizes))
    if dtype == torch.float32:
        assert (sizes < threshold).sum() == round(share * len(sizes))


def test_counts_of_a_share_are_exact():
    model = llama()
    optimizer = SparseAdamW(SaRA(share=0.125).groups(model), lr=1e-3)
    train(model, optimizer, steps=1)
    held = sum(len(state["indices"]) for state in optimizer.state.values())
    assert held == round(0.125 * sum(p.numel() for p in matrices(model).values()))
    assert optimizer.param_groups[0]["density"] == 0.125


def test_chosen_anew_what_grew_stays_as_it_is():
    """By the weights themselves: published code takes |p| for p there, and chooses from the tensor it writes to."""
    model = llama()
    optimizer = SparseAdamW(SaRA(threshold=THRESHOLD, reselect_every=3).groups(model), lr=1e-3)
    first = {name: p.detach().abs() < THRESHOLD for name, p in matrices(model).items()}
    train(model, optimizer, steps=3)
    between, loss = weights_of(model), loss_of(model).detach()
    left = {name: between[name].abs() < THRESHOLD for name in first}
    assert torch.equal(loss_of(model), loss)
    train(model, optimizer, steps=2)
    there = moved(model, between)
    grown = 0
    for name, mask in first.items():
        assert not (left[name] & ~mask).any()
        assert not (there[name] & ~left[name]).any()
        grown += int((mask & ~left[name]).sum())
    assert grown > 100
    assert sum(int(mask.sum()) for mask in left.values()) == sum(len(s["indices"]) for s in optimizer.state.values())


@pytest.mark.parametrize("decay_to", ["start", "zero"])
def test_decay_without_gradient_ends_where_it_says(decay_to):
    model = llama(1)
    before = weights_of(model)
    optimizer = SparseAdamW(SaRA(threshold=THRESHOLD, decay_to=decay_to).groups(model), lr=0.1, weight_decay=1.0)
    for _ in range(3):
        for p in matrices(model).values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for name, p in matrices(model).items():
        small = before[name].abs() < THRESHOLD
        expected = torch.where(small & (decay_to == "zero"), before[name] * 0.9**3, before[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def test_a_mask_is_made_again_from_the_base_and_the_threshold():
    model = llama()
    optimizer = SparseAdamW(SaRA(threshold=THRESHOLD).groups(model), lr=1e-3)
    train(model, optimizer)
    again = copy.deepcopy(model)
    fresh = SparseAdamW(SaRA(threshold=THRESHOLD).groups(again), lr=1e-3)
    fresh.load_state_dict(optimizer.state_dict())
    for one, other in ((model, optimizer), (again, fresh)):
        train(one, other, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_plan_of_a_share_needs_no_weights():
    model = llama(device="meta")
    optimizer = SparseAdamW(SaRA(share=0.25, decay_to="zero").groups(model), lr=1e-3)
    planned = sum(own.nbytes for _, state in optimizer.planned_state() for own in state)
    held = matrices(model).values()
    assert planned == sum(12 * round(0.25 * p.numel()) + 4 for p in held)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, r"give one of threshold and share, got \(None, None\)"),
        ({"threshold": 0.1, "share": 0.1}, r"give one of threshold and share, got \(0.1, 0.1\)"),
        ({"threshold": 0}, "threshold must be a number > 0 or None, got 0"),
        ({"share": 0.0}, r"share must be a number in \(0, 1\] or None, got 0.0"),
        ({"share": 0.1, "reselect_every": 0}, "reselect_every must be a whole number >= 1 or None, got 0"),
        ({"share": 0.1, "decay_to": "base"}, "decay_to must be one of zero, start, got 'base'"),
        ({"share": 0.1, "target_modules": ["q_porj"]}, "target_modules: 'q_porj' matches no trainable linear layer"),
        ({"threshold": 1e-30}, "threshold must be above the smallest weight of the target matrices, got 1e-30"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        selection_groups(llama(1), "sara", **keys)
