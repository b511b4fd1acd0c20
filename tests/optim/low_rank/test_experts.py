"""A tensor (E, m, n) in a group with a rank is E matrices, whatever the method: each moves as one of its own."""

import copy
import pickle

import pytest
import torch
from catalogue import VARIANTS
from torch import nn

from gracile import optim
from gracile.optim import full_state, load_full_state, param_groups, state_bytes
from gracile.optim.core import batches
from gracile.optim.full_state import full_state_of
from gracile.optim.low_rank.optimizer import LowRankOptimizer

SHAPES = [(3, 20, 12), (3, 12, 20), (2, 16, 16)]  # tall, wide and square: P replaces either side
STEPS = 9  # refreshes at 0, 4 and 8
NAMES = [name for name, v in VARIANTS.items() if v.quadratic and issubclass(v.cls, LowRankOptimizer)]
DRAWN = ("APOLLOAdamW", "APOLLOAdamW Mini", "GaLorePlusAdamW", "GaLorePlusAdamW heads")  # from a seed and a place
DIVISIBLE = {"GaLorePlusAdamW heads": [(3, 20, 12), (2, 16, 16)]}


def built(name, W, **more):
    use = VARIANTS[name].quadratic
    parameter = nn.Parameter(W.clone())
    return parameter, VARIANTS[name].cls([{"params": [parameter], **use.matrices, **more}], **use.keys)


def gradients(shape, steps=STEPS, idle=()):
    """Of each step; ``idle`` are pairs of an expert and a step in which it sees nothing."""
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(t)) for t in range(steps)]
    for expert, step in idle:
        drawn[step][expert] = 0
    return drawn


def train(parameter, optimizer, grads):
    for G in grads:
        parameter.grad = G.clone()
        optimizer.step()


def watched(move, told):
    def moves(batch):
        told.append(len(batch))
        move(batch)

    return moves


@pytest.fixture
def one_by_one(monkeypatch):
    """Small ones are moved as one stack, by other kernels."""
    monkeypatch.setattr(batches, "BORN_STACKED_BELOW", 0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DRAWN])
def test_small_experts_are_moved_together_as_they_would_be_one_by_one(name, monkeypatch):
    for shape in SHAPES:
        W = torch.randn(shape, generator=torch.Generator().manual_seed(100))
        ends, moved = [], []
        for most in (0, 2**16):
            monkeypatch.setattr(batches, "BORN_STACKED_BELOW", most)
            held, optimizer = built(name, W)
            optimizer._update_stacked = watched(optimizer._update_stacked, moved)
            train(held, optimizer, gradients(shape, idle=[(1, 0), (1, 1), (1, 4), (0, 8)]))
            ends.append(held.detach())
        assert max(moved) == shape[0]
        far = (ends[0] - ends[1]).norm() / (ends[0] - W).norm()
        assert far < (0.02 if "bit" in name else 1e-4)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("name", NAMES)
def test_each_expert_moves_as_a_matrix_of_its_own(name):
    for shape in DIVISIBLE.get(name, SHAPES):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(100))
        together, optimizer = built(name, W)
        idle = [(1, 0), (1, 1), (1, 4), (0, 8)]  # unseen at first, and at a refresh
        train(together, optimizer, gradients(shape, idle=idle))
        for e in range(shape[0]):
            alone, its = built(name, W[e])
            train(alone, its, [G[e] for G in gradients(shape, idle=idle)])
            if e == 0 or name not in DRAWN:
                assert torch.equal(together[e], alone)
                held = {key: t if key == "step" else t[e] for key, t in optimizer.state[together].items()}
                assert held.keys() == its.state[alone].keys()
                assert all(value.stride() == its.state[alone][key].stride() for key, value in held.items())
                assert all(torch.equal(value, its.state[alone][key]) for key, value in held.items() if key != "seed")
            else:
                assert not torch.equal(together[e], alone)
        assert (together.detach() - W).flatten(1).norm(dim=1).min() > 1e-3
        assert optimizer.state[together]["step"] == STEPS
        use = VARIANTS[name].quadratic
        assert state_bytes(optimizer) == VARIANTS[name].cls.state_bytes_for(shape, **use.matrices, **use.keys)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_from_what_was_saved(name, tmp_path):
    shape = DIVISIBLE.get(name, SHAPES)[0]
    grads = gradients(shape, 2 * STEPS)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(100))
    first, optimizer = built(name, W)
    train(first, optimizer, grads[:STEPS])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved, whole = torch.load(tmp_path / "state.pt", weights_only=True), full_state(optimizer)
    again, other = built(name, first.detach())
    other.load_state_dict(saved)
    third, elsewhere = built(name, first.detach())
    train(third, elsewhere, grads[:1])
    with torch.no_grad():
        third.copy_(first)
    load_full_state(elsewhere, whole)
    pickled = pickle.loads(pickle.dumps(optimizer))
    (fourth,) = pickled.param_groups[0]["params"]
    twin = copy.deepcopy(optimizer)
    (fifth,) = twin.param_groups[0]["params"]
    for parameter, its in [(first, optimizer), (again, other), (third, elsewhere), (fourth, pickled), (fifth, twin)]:
        train(parameter, its, grads[STEPS:])
        if parameter is third and "bit" in name:  # whose moments travel as numbers
            assert torch.allclose(parameter, first, atol=1e-2)
        else:
            assert torch.equal(parameter, first)


@pytest.mark.parametrize("method", ["svd", "iterate"])
def test_an_expert_is_due_until_it_has_seen_a_gradient_and_keeps_its_basis_where_it_sees_none(method):
    shape = (3, 20, 12)
    W = torch.randn(shape)
    held, optimizer = built("GaLoreAdamW", W, subspace_method=method, update_proj_gap=5)
    grads = gradients(shape, 11, idle=[(1, 0), (1, 1), (1, 2), (2, 5), (2, 6), (2, 10)])
    train(held, optimizer, grads[:3])
    assert torch.equal(held[1], W[1])
    assert not optimizer.state[held]["exp_avg"][1].any()
    train(held, optimizer, grads[3:4])
    P = optimizer.state[held]["basis"][1]
    kept = (grads[3][1] @ P).norm() / torch.linalg.svdvals(grads[3][1])[:4].norm()
    assert kept > 0.99  # found in its first step with a gradient, between refreshes
    train(held, optimizer, grads[4:5])
    before = {key: value.clone() for key, value in optimizer.state[held].items()}
    train(held, optimizer, grads[5:6])  # a refresh, at which the last expert sees nothing
    after = optimizer.state[held]
    assert torch.allclose(before["basis"][2], after["basis"][2], atol=1e-5)
    assert not torch.allclose(before["basis"][0], after["basis"][0], atol=1e-2)
    assert torch.allclose(after["exp_avg"][2], 0.9 * before["exp_avg"][2])
    assert torch.allclose(after["exp_avg_sq"][2], 0.999 * before["exp_avg_sq"][2])


@pytest.mark.usefixtures("one_by_one")
def test_moments_in_8_bits_are_of_each_expert():
    """4,140 and 4,100 numbers: blocks of 256 that do not end where an expert does."""
    for shape, rank in [((2, 690, 8), 6), ((2, 6, 820), 5)]:
        W = torch.randn(shape)
        together, optimizer = built("GaLoreAdamW8bit", W, rank=rank)
        train(together, optimizer, gradients(shape, 5))
        for e in range(2):
            alone, its = built("GaLoreAdamW8bit", W[e], rank=rank)
            train(alone, its, [G[e] for G in gradients(shape, 5)])
            assert torch.equal(together[e], alone)
            assert torch.equal(optimizer.state[together]["exp_avg"][e], its.state[alone]["exp_avg"])
        whole = full_state(optimizer)
        moved, other = built("GaLoreAdamW8bit", together.detach(), rank=rank)
        train(moved, other, gradients(shape, 1))
        load_full_state(other, whole)
        values = whole["parameters"][0]["exp_avg"]
        again = full_state(other)["parameters"][0]["exp_avg"]  # coded once more
        assert (again - values).norm() < 0.02 * values.norm()
        assert torch.equal(full_state_of("", optimizer.state_dict())["parameters"][0]["exp_avg"], values)


def test_experts_in_bf16_are_rounded_by_noise_of_their_own():
    W = torch.ones(3, 20, 12, dtype=torch.bfloat16)
    G = torch.randn(1, 20, 12, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1).bfloat16()
    held, optimizer = built("GaLoreAdamW", W, stochastic_rounding=True)
    optimizer.param_groups[0]["lr"] = 1e-3
    train(held, optimizer, [G] * 3)
    assert held.isfinite().all()
    assert not torch.equal(held[0], held[1])
    assert not torch.equal(held[1], held[2])
    moved = (held.float() - 1).mean(dim=(1, 2)).abs()
    assert (moved < 1e-2).all()


def test_a_small_mixture_trains_with_less_state_than_adamw():
    from mixtures import build_mixture

    model = build_mixture("qwen3_moe")
    optimizer = optim.GaLoreAdamW(param_groups(model, rank=4), lr=0.01)
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    ranked = {id(p) for group in optimizer.param_groups if group["rank"] for p in group["params"]}
    held = sum(t.nbytes for p, state in optimizer.state.items() if id(p) in ranked for t in state.values())
    assert held < 0.5 * sum(8 * p.numel() for p in model.parameters() if id(p) in ranked)


def test_other_tensors_are_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"rank=2 needs matrices, or experts \(E, m, n\), got a parameter of shape \(2, 3"
    ):
        optim.GaLoreAdamW([nn.Parameter(torch.zeros(2, 3, 4, 5))], rank=2)
    theirs = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2, 9, 2), "projector": None}}}
    W = nn.Parameter(torch.zeros(2, 9, 7))
    own = optim.GaLoreAdamW([W], rank=2)
    theirs["param_groups"] = [{"rank": 2, "params": [0]}]
    with pytest.raises(ValueError, match="galore-torch projects matrices, and here it is 2"):
        own.load_state_dict(theirs)
