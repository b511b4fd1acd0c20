"""``refreshes_at_once``: subspaces found anew in turns, by one clock whether gradients are freed or not."""

import io

import pytest
import torch
from torch import nn

from gracile import optim
from gracile.optim import release_gradients
from gracile.optim.core import batches
from gracile.optim.core.projected_gradient import ProjectedGradient
from gracile.optim.low_rank import optimizer as low_rank
from gracile.optim.released import kept_bytes

SHAPES = [(40, 24), (24, 40), (24, 24), (24, 40), (3, 24, 16)]  # the last of experts, whose gradient stays
GAP, STEPS, PASSES = 4, 20, 4
KINDS = {
    "AdamW": (optim.GaLoreAdamW, {}),
    "svd": (optim.GaLoreAdamW, {"subspace_method": "svd"}),
    "Lion": (optim.GaLoreLion, {}),
    "Adafactor": (optim.GaLoreAdafactor, {"relative_step": False, "lr": 0.01}),
    "8 bits": (optim.GaLoreAdamW8bit, {}),
    "lazy": (optim.GaLoreAdamW8bit, {"cos_threshold": 0.1, "queue_size": 1}),
}


def built(kind="AdamW", at_once=2, dtype=torch.float32, shapes=SHAPES, **more):
    if KINDS[kind][0] is optim.GaLoreAdamW8bit:
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    held = nn.ParameterList([*(nn.Parameter(torch.randn(s).to(dtype)) for s in shapes), nn.Parameter(torch.zeros(5))])
    group = {"params": list(held)[:-1], "rank": 4, "update_proj_gap": GAP, "refreshes_at_once": at_once}
    cls, keys = KINDS[kind]
    return held, cls([group, {"params": [held[-1]]}], **{"lr": 0.01, **keys, **more})


def gradient(p, step, micro):
    """With more of some directions than of others; of the first step all passes alike, of step -1 not."""
    chance = torch.Generator().manual_seed(1000 * (step + 1) + (micro if step else 0))
    G = torch.randn(p.shape, generator=chance)
    return (G * torch.linspace(3, 0.1, p.shape[-1])).to(p.dtype) / PASSES


def trained(keep, *given, steps=range(STEPS), clip=0.0, bad=None, saved_at=None, **more):
    """Weights, and in each step which matrices got another subspace and which gradients were whole."""
    held, optimizer = built(*given, **more)
    if keep:
        release_gradients(held, optimizer, keep=keep)
    new, whole = [], []
    for step in steps:
        if step == saved_at:
            buffer = io.BytesIO()
            torch.save((held.state_dict(), optimizer.state_dict()), buffer)
            buffer.seek(0)
            held, optimizer = built(*given, **more)
            weights, state = torch.load(buffer, weights_only=True)
            held.load_state_dict(weights)
            optimizer.load_state_dict(state)
            if keep:
                release_gradients(held, optimizer, keep=keep)
        before = bases(held, optimizer)
        for micro in range(PASSES):
            sum((p * gradient(p, step, micro)).sum() for p in held).backward()
        whole.append([n for n, p in enumerate(held) if p.dim() == 2 and not isinstance(p.grad, ProjectedGradient)])
        if clip:
            nn.utils.clip_grad_norm_(held.parameters(), clip)
        if step != bad:
            optimizer.step()
        optimizer.zero_grad()
        after = bases(held, optimizer)
        new.append([n for n in range(len(SHAPES)) if n in after and not same(before.get(n), after[n])])
    return list(held), new, whole


def bases(held, optimizer):
    states = [optimizer.state.get(p, {}) for p in held]
    return {n: state["basis"].clone() for n, state in enumerate(states) if "basis" in state}


def same(one, other):
    return one is not None and torch.equal(one, other)


def apart(one, other):
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(one, other, strict=True))


TURNS = [[0, 1, 2, 3, 4], [2, 3], [4], [], *[[0, 1], [2, 3], [4], []] * 4]


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_refreshed_in_turns_and_as_many_gradients_kept(kind):
    one, turns, _ = trained(None, kind)
    other, told, whole = trained("coordinates", kind)
    assert told == turns
    if kind == "lazy":  # some turns are left out
        assert all(set(found) <= set(turn) for found, turn in zip(turns, TURNS, strict=False))
        assert 8 <= sum(map(len, turns)) < sum(map(len, TURNS))
    else:
        assert turns == TURNS
    assert whole == [[0, 1], *([n for n in found if n < 4] for found in turns[1:])]
    assert apart(one, other) < 1e-6


def test_a_step_that_is_skipped_clipped_or_resumed_keeps_the_clock():
    one, turns, _ = trained(None, clip=0.3, bad=5, saved_at=7)
    other, told, whole = trained("coordinates", clip=0.3, bad=5, saved_at=7)
    assert told[6:] == turns[6:] == TURNS[5:-1]
    assert whole[6:] == [[n for n in found if n < 4] for found in TURNS[5:-1]]
    assert apart(one, other) < 0.02  # for the norm of a sum is known to some percent
    unbroken, *_ = trained("coordinates", clip=0.3, bad=5)
    assert all(map(torch.equal, other, unbroken))


def test_bf16_weights_and_chance():
    one, other = (trained(keep, dtype=torch.bfloat16, stochastic_rounding=True)[0] for keep in (None, "coordinates"))
    assert apart(one, other) < 0.01


def test_all_at_once_is_the_clock_of_old():
    one, other = trained(None, at_once=len(SHAPES))[0], trained(None, at_once=None)[0]
    assert all(map(torch.equal, one, other))


def test_alike_matrices_with_other_turns_are_found_apart_where_launches_cost(monkeypatch):
    """As on a GPU, where those that are due together are found as a stack."""
    alone = trained(None, shapes=[(24, 40)] * 5)
    for module in (batches, low_rank):
        monkeypatch.setattr(module, "launches_cost", lambda device: True)
    for keep in (None, "coordinates"):
        stacked = trained(keep, shapes=[(24, 40)] * 5)
        assert stacked[1] == alone[1] == TURNS
        assert apart(alone[0], stacked[0]) < 1e-5


def test_steps_until_a_refresh_are_those_of_the_next_turn():
    held, optimizer = built(capturable=True)
    told = []
    for step in range(6):
        for p in held:
            p.grad = gradient(p, step, 0)
        told.append(optimizer.steps_until_refresh())
        optimizer.step()
    assert told == [0, 0, 0, 1, 0, 0]


def test_a_matrix_without_a_usable_gradient_waits_for_one():
    """Its first subspace is then found from the first pass that has one."""

    def run(keep):
        held, optimizer = built()
        if keep:
            release_gradients(held, optimizer, keep=keep)
        for step in range(10):
            for micro in range(PASSES):
                (held[2] * (gradient(held[2], 0 if step == 3 else step, micro) * (step > 2))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [held[2]]

    assert apart(run(None), run("coordinates")) < 1e-6


def test_passes_that_differ_in_the_first_step_change_the_first_subspaces_alone():
    """Found from one of four passes; the next turn has all of them."""
    (one, *_), (other, *_) = (trained(keep, steps=[-1]) for keep in (None, "coordinates"))
    assert 0 < apart(one[2:4], other[2:4]) < 0.02
    assert apart(one[:2], other[:2]) < 1e-6


def test_what_is_kept_at_most():
    held, optimizer = built()
    release_gradients(held, optimizer)
    most = 0
    for step in range(GAP + 1):
        for micro in range(2):
            sum((p * gradient(p, step, micro)).sum() for p in held).backward()
        kept = [[*p.grad.kept] if isinstance(p.grad, ProjectedGradient) else [p.grad] for p in held]
        most = max(most, sum(tensor.nbytes for each in kept for tensor in each))
        optimizer.step()
        optimizer.zero_grad()
    assert kept_bytes(optimizer, "coordinates", passes=None) == most
    assert kept_bytes(optimizer, "coordinates") < most < kept_bytes(built(at_once=None)[1], "coordinates", passes=None)
    assert kept_bytes(built(at_once=None)[1], "coordinates", passes=None) == sum(p.nbytes for p in held)


def test_turns_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="1 is too few for 5 matrices in update_proj_gap=4 steps; give 2 or more"):
        built(at_once=1)
    with pytest.raises(ValueError, match="refreshes_at_once must be a whole number >= 1"):
        built(at_once=0)
    with pytest.raises(TypeError, match="refreshes_at_once"):
        optim.FiraAdamW([nn.Parameter(torch.zeros(4, 4))], refreshes_at_once=1)
