"""The nuclear norm of the change, as a term of the gradient."""

import pytest
import torch
from selected_models import llama, loss_of
from torch import nn

from gracile.optim import SparseAdamW
from gracile.selections import Entries, NuclearPenalty, Rows, SaRA
from gracile.selections.method import masked_group
from gracile.selections.nuclear import polar_factor

M, N = 12, 8


def trained(seed=0):
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(M, N, generator=generator))
    mask = torch.rand(M, N, generator=generator) < 0.5
    return p, mask, [masked_group({p: Entries(mask)})]


@pytest.mark.parametrize("of", ["delta", "weights"])
def test_it_is_the_gradient_of_the_norm_in_the_mask(of):
    p, mask, groups = trained()
    penalty = NuclearPenalty(groups, weight=0.3, of=of, least_side=1)
    start = p.detach().clone()
    with torch.no_grad():
        p += 0.1 * torch.randn(M, N, generator=torch.Generator().manual_seed(4))
    W = p.detach().double().requires_grad_()
    D = torch.where(mask, W - start.double() if of == "delta" else W, 0.0)
    (0.3 * torch.linalg.matrix_norm(D, "nuc")).backward()
    p.grad = torch.ones_like(p)
    penalty.add_(0)
    torch.testing.assert_close(p.grad - 1, W.grad.float(), rtol=0, atol=1e-5)


def test_no_change_has_no_penalty_and_a_change_of_rank_one_that_of_its_own_vectors():
    assert not polar_factor(torch.zeros(M, N)).any()
    u, v = torch.randn(M, 1), torch.randn(1, N)
    torch.testing.assert_close(polar_factor(u @ v), u @ v / u.norm() / v.norm(), rtol=0, atol=1e-5)


def test_it_lowers_the_rank_of_what_is_trained():
    def singular_values(weight):
        p, _, groups = trained()
        start, penalty = p.detach().clone(), NuclearPenalty(groups, weight=weight, least_side=1)
        optimizer = SparseAdamW(groups, lr=0.02)
        for step in range(60):
            p.grad = (p.detach() - start) - 0.2 * torch.ones(M, N)
            penalty.add_(step)
            optimizer.step()
        return torch.linalg.svdvals(p.detach() - start)

    free, held = singular_values(0.0), singular_values(0.3)
    assert (held[1:].sum() / held[0]) < 0.8 * (free[1:].sum() / free[0])


def test_one_matrix_a_step_by_the_seed_of_those_that_are_large():
    model = llama(2, hidden_size=72, intermediate_size=72, key_value_heads=2, heads=4)
    penalty = NuclearPenalty(SaRA(share=0.1).groups(model), seed=1, every=2)
    large = {id(p) for name, p in model.named_parameters() if "proj" in name and min(p.shape) > 64}
    seen = [penalty.matrix_at(step) for step in range(0, 120, 2)]
    assert {id(p) for p in seen} == large
    assert penalty.matrix_at(1) is None
    assert [id(penalty.matrix_at(step)) for step in range(0, 120, 2)] == [id(p) for p in seen]
    loss_of(model).backward()
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    with torch.no_grad():
        seen[0].add_(0.01)
    penalty.add_(0)
    changed = [p for p, G in before.items() if not torch.equal(p.grad, G)]
    assert len(changed) == 1
    assert changed[0] is seen[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight": -1}, "weight must be a number >= 0, got -1"),
        ({"of": "base"}, "of must be one of delta, weights, got 'base'"),
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"least_side": 99}, "least_side must leave a matrix, got 99"),
        ({"groups": [{"params": []}]}, "groups must be those of selection_groups, with selections"),
        ({"groups": [masked_group({nn.Parameter(torch.ones(2, 2)): Rows((0,))})]}, "least_side must leave a matrix"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        NuclearPenalty(**{"groups": trained()[2], **keys})
