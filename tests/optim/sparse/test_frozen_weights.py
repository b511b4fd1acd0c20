"""Weights outside of masks that keep their values, beside torch.optim.AdamW on what is trained alone."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers import gradients
from torch import nn

from gracile.optim import SparseAdamW, full_state, load_full_state, state_bytes
from gracile.optim.core import batches
from gracile.optim.core import optimizer as stepping
from gracile.optim.sparse.selected import Below, Columns, Entries, Rows

M, N, THRESHOLD = 12, 10, 0.4
ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.3}
FROZEN = {"outside": "frozen", "drop_fraction": 0.0}


def matrix(seed=0, dtype=torch.float32):
    W = torch.randn(M, N, generator=torch.Generator().manual_seed(seed))
    W[0] = 0.0  # a dense model's zeros tell nothing about a mask
    return nn.Parameter(W.to(dtype))


def random_mask():
    return torch.rand(M, N, generator=torch.Generator().manual_seed(5)) < 0.3


def lines(rows, columns):
    there = torch.zeros(M, N, dtype=torch.bool)
    there[rows] = True
    there[:, columns] = True
    return there


SELECTIONS = {
    "rows": (Rows((7, 2)), lambda W: lines([2, 7], [])),
    "columns": (Columns((0, 9, 4)), lambda W: lines([], [0, 4, 9])),
    "entries": (Entries(random_mask()), lambda W: random_mask()),
    "below": (Below(THRESHOLD), lambda W: W.abs() < THRESHOLD),
}


def indices_of(optimizer, p):
    there = torch.zeros(p.numel(), dtype=torch.bool)
    return there.index_fill_(0, optimizer.state[p]["indices"].long(), True).view(p.shape)


def run(optimizer, p, begin, end):
    for G in gradients(*p.shape, steps=end)[begin:]:
        p.grad = G.to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_moves_as_if_it_were_all_and_the_rest_keeps_its_bits(name):
    selection, expected = SELECTIONS[name]
    p = matrix()
    before, there = p.detach().clone(), expected(p.detach())
    alone = nn.Parameter(before[there].clone())
    optimizer = SparseAdamW([{"params": [p], "selected": {p: selection}}], **FROZEN, **ADAM)
    reference = torch.optim.AdamW([alone], **ADAM)
    for G in gradients(M, N, steps=6):
        p.grad, alone.grad = G.clone(), G[there].clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(p.detach()[there], alone.detach(), rtol=0, atol=1e-6)
    assert torch.equal(p.detach()[~there], before[~there])
    assert not torch.equal(p.detach()[there], before[there])
    assert torch.equal(indices_of(optimizer, p), there)
    count = int(there.sum())
    assert state_bytes(optimizer) == 4 + 12 * count
    assert optimizer.param_groups[0]["density"] == count / (M * N)


@pytest.mark.parametrize("decay_to", ["zero", "start"])
def test_the_plan_of_a_selection_is_what_is_held(decay_to):
    keys = {**FROZEN, "decay_to": decay_to}
    p = matrix()
    optimizer = SparseAdamW([p], selected=Rows((1, 2, 3)), **keys)
    run(optimizer, p, 0, 1)
    planned = SparseAdamW.state_bytes_for((M, N), selected=Rows((1, 2, 3)), **keys)
    assert planned == state_bytes(optimizer) == 4 + 3 * N * (16 if decay_to == "start" else 12)
    assert SparseAdamW.state_bytes_for((M, N), selected=Below(0.1, share=0.25), **FROZEN) == 4 + 30 * 12


def test_decay_to_the_start_is_decay_of_the_change():
    p = matrix()
    optimizer = SparseAdamW([p], selected=Rows((3, 4)), decay_to="start", **FROZEN, **ADAM)
    alone = nn.Parameter(p.detach()[3:5].clone())
    start = alone.detach().clone()
    reference = torch.optim.AdamW([alone], **{**ADAM, "weight_decay": 0.0})
    for G in gradients(M, N, steps=6):
        with torch.no_grad():
            alone -= ADAM["lr"] * ADAM["weight_decay"] * (alone - start)
        p.grad, alone.grad = G.clone(), G[3:5].clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(p.detach()[3:5], alone.detach(), rtol=0, atol=1e-6)


def test_a_moving_mask_leaves_what_it_drops_and_takes_what_it_grows_as_they_are():
    p = matrix()
    optimizer = SparseAdamW(
        [p], density=0.25, outside="frozen", update_every=2, drop_fraction=0.5, t_end=9, init="smallest", **ADAM
    )
    held, changed = None, 0
    for t, G in enumerate(gradients(M, N, steps=8), start=1):
        before = p.detach().clone()
        p.grad = G
        optimizer.step()
        now = indices_of(optimizer, p)
        moved = p.detach() != before
        stays = torch.ones_like(now) if held is None else ~held
        if held is None:
            smallest = before.abs().view(-1).sort(stable=True).indices[:30]
            assert set(optimizer.state[p]["indices"].tolist()) == set(smallest.tolist())
        else:
            assert not moved[stays].any(), "only the mask of before the change has moved"
        grown = now & ~held if held is not None else now & False
        changed += int(grown.sum())
        if t % 2 == 0:
            flat = grown.view(-1)[optimizer.state[p]["indices"].long()]
            assert not optimizer.state[p]["exp_avg"][flat].any()
        assert len(optimizer.state[p]["indices"]) == 30
        held = now
    assert changed > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_a_matrix_is_plain_adamw_also_of_its_zeros(dtype):
    p, q = matrix(dtype=dtype), matrix(dtype=dtype)
    optimizer = SparseAdamW([p], density=1.0, **FROZEN, **ADAM)
    reference = SparseAdamW([q], sparsity=0.0, drop_fraction=0.0, **ADAM)
    run(optimizer, p, 0, 4)
    run(reference, q, 0, 4)
    assert torch.equal(p, q)
    assert (p[0] != 0).all()


def test_zeros_of_a_dense_matrix_tell_nothing_about_its_mask():
    p, q = matrix(), matrix()
    with torch.no_grad():
        q[:7] = 0.0
    for w in (p, q):
        optimizer = SparseAdamW([w], density=0.5, **FROZEN)
        run(optimizer, w, 0, 1)
        w.mask = indices_of(optimizer, w)
    assert torch.equal(p.mask, q.mask)
    assert p.mask.sum() == 60


def test_stochastic_rounding_leaves_frozen_weights():
    p = matrix(dtype=torch.bfloat16)
    before = p.detach().clone()
    optimizer = SparseAdamW([p], selected=Columns((2,)), stochastic_rounding=True, **FROZEN, **ADAM)
    run(optimizer, p, 0, 5)
    outside = ~lines([], [2])
    assert torch.equal(p.detach()[outside], before[outside])
    assert not torch.equal(p.detach(), before)


def test_many_that_move_together_move_as_each_alone(monkeypatch):
    def trained():
        held = [matrix(seed) for seed in range(4)]
        optimizer = SparseAdamW(held, selected=Rows((1, 5)), decay_to="start", **FROZEN, **ADAM)
        for t in range(4):
            for p, G in zip(held, gradients(M, N, steps=4, seed=9), strict=True):
                p.grad = G * (t + 1)
            optimizer.step()
        return held

    alone = trained()
    for module in (batches, stepping):  # as on a GPU
        monkeypatch.setattr(module, "launches_cost", lambda device: True)
    together = trained()
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
        assert torch.equal(one[6:], other[6:])


def test_experts_in_one_tensor_are_selected_by_size_or_mask():
    W = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))
    for selection in (Below(0.5), Entries(W.abs() < 0.5)):
        p = nn.Parameter(W.clone())
        optimizer = SparseAdamW([p], selected=selection, **FROZEN, **ADAM)
        run(optimizer, p, 0, 3)
        assert torch.equal(p.detach() != W, W.abs() < 0.5)


# ---- chosen anew -----------------------------------------------------------------------------------------------------


def small(p):
    return SparseAdamW([p], selected=Below(THRESHOLD), reselect_every=3, decay_to="start", **FROZEN, **ADAM)


def test_chosen_anew_it_is_an_optimizer_that_begins_there():
    p, q = matrix(), matrix()
    optimizer = small(p)
    run(optimizer, p, 0, 3)
    first = matrix().detach().abs() < THRESHOLD
    left = p.detach().abs() < THRESHOLD
    assert 0 < left.sum() < first.sum()
    assert not (left & ~first).any()
    assert torch.equal(indices_of(optimizer, p), left)
    assert optimizer.state[p]["step"] == 0
    grown_out, at_that_time = first & ~left, p.detach().clone()
    run(small(q), q, 0, 3)
    fresh = small(q)
    for opt, w in ((optimizer, p), (fresh, q)):
        run(opt, w, 3, 5)
    assert torch.equal(p, q)
    assert torch.equal(p.detach()[grown_out], at_that_time[grown_out])


def test_a_kept_mask_is_not_chosen_anew():
    p = matrix()
    optimizer = SparseAdamW([p], selected=Below(THRESHOLD), **FROZEN, **ADAM)
    run(optimizer, p, 0, 7)
    assert torch.equal(indices_of(optimizer, p), matrix().detach().abs() < THRESHOLD)
    assert optimizer.state[p]["step"] == 7


# ---- saved and copied ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 3, 4], ids="step {}".format)
@pytest.mark.parametrize("full", [False, True], ids=["state_dict", "full_state"])
def test_resumed_it_ends_as_uninterrupted(at, full):
    p = matrix()
    optimizer = small(p)
    run(optimizer, p, 0, at)
    saved = copy.deepcopy(full_state(optimizer) if full else optimizer.state_dict())
    q = nn.Parameter(p.detach().clone())
    resumed = small(q)
    load_full_state(resumed, saved) if full else resumed.load_state_dict(saved)
    run(optimizer, p, at, 7)
    run(resumed, q, at, 7)
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["indices"], resumed.state[q]["indices"])


def test_the_selection_is_pickled_before_there_is_state_and_no_part_of_a_checkpoint():
    p = matrix()
    optimizer = SparseAdamW([p], selected=Rows((1,)), **FROZEN)
    assert not any("selected" in group for group in optimizer.state_dict()["param_groups"])
    again = pickle.loads(pickle.dumps(optimizer))
    (q,) = again.param_groups[0]["params"]
    run(again, q, 0, 1)
    assert torch.equal(indices_of(again, q), lines([1], []))


# ---- refused ---------------------------------------------------------------------------------------------------------

ROW = {"selected": Rows((1,))}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"outside": "kept"}, "outside must be one of zero, frozen, got 'kept'"),
        ({**ROW, "drop_fraction": 0.0}, "selected is for outside='frozen', got 'zero'"),
        ({**FROZEN, **ROW, "density": 0.5}, "selected says how many weights there are; density must be None, got 0.5"),
        ({**ROW, "outside": "frozen"}, "drop_fraction must be 0 with selected, which does not move, got 0.3"),
        ({**FROZEN, **ROW, "structure": "block"}, "structure must be 'unstructured' with selected, got 'block'"),
        (
            {**FROZEN, "selected": {}},
            r"selected has nothing for a parameter; put it into another group, got \(12, 10\)",
        ),
        ({**FROZEN, "selected": [1]}, r"selected must be a Selection, or a mapping from parameters to them, got \[1\]"),
        ({**FROZEN, "selected": Rows((12,))}, "rows must be below 12, got 12"),
        ({**FROZEN, "selected": Columns((10,))}, "columns must be below 10, got 10"),
        (
            {**FROZEN, "selected": Entries(torch.ones(2, 2, dtype=torch.bool))},
            r"mask must be of the parameter's shape \(12, 10\), got \(2, 2\)",
        ),
        ({"density": 0.5, "t_end": 9, "init": "smallest"}, "init='smallest' is for outside='frozen', got 'zero'"),
        ({"density": 0.5, "t_end": 9, "decay_to": "start"}, "decay_to='start' is for outside='frozen', got 'zero'"),
        ({"density": 0.5, "t_end": 9, "reselect_every": 4}, "reselect_every is for outside='frozen', got 'zero'"),
        ({**FROZEN, **ROW, "reselect_every": 4}, r"reselect_every is for selections by size \(Below\), got 'Rows'"),
        (
            {**FROZEN, "density": 0.5, "reselect_every": 4},
            "init must be 'smallest' or 'magnitude' with reselect_every, got None",
        ),
        (
            {"outside": "frozen", "density": 0.5, "reselect_every": 4, "init": "smallest", "t_end": 9},
            "drop_fraction must be 0 with reselect_every, got 0.3",
        ),
        (
            {**FROZEN, "density": 0.5, "reselect_every": 4, "init": "smallest", "capturable": True},
            "reselect_every must be None with capturable=True, got 4",
        ),
        (
            {**FROZEN, "density": 0.5, "rescale_init": True},
            "rescale_init changes weights; it must be False with outside='frozen', got True",
        ),
        ({**FROZEN, "selected": Below(0.1), "reselect_every": 0}, "reselect_every must be a whole number >= 1 or None"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(keys, message):
    with pytest.raises(ValueError, match=f"^{message}") as told:
        SparseAdamW([matrix()], **keys)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rows(()), "rows must be whole numbers >= 0, each once and one at least"),
        (lambda: Columns((1, 1)), "columns must be whole numbers >= 0, each once"),
        (lambda: Rows((-1,)), "rows must be whole numbers >= 0"),
        (lambda: Below(0.0), "threshold must be a number > 0, got 0.0"),
        (lambda: Below(0.1, share=2), r"share must be a number in \[0, 1\], got 2"),
        (lambda: Entries(torch.ones(2)), "mask must be a bool tensor"),
        (lambda: Entries(torch.zeros(2, dtype=torch.bool)), "mask must be True somewhere; leave the parameter out"),
        (
            lambda: SparseAdamW.state_bytes_for((4, 4), selected=Below(0.1), **FROZEN),
            "a plan cannot look at weights; give",
        ),
    ],
)
def test_a_bad_selection_is_refused_in_a_line(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_a_size_that_is_the_threshold_is_not_below_it():
    sizes = torch.tensor([0.5, -0.25, 0.75, -0.5, 0.0])
    for W in (sizes, sizes.double(), sizes.bfloat16()):
        assert Below(0.5).count(W) == 2
        assert Below(0.5).places(0, W, (5,)).tolist() == [1, 4]


@pytest.mark.parametrize("selection", [own for own, _ in SELECTIONS.values()], ids=SELECTIONS)
def test_parts_of_a_parameter_have_the_places_of_the_whole(selection):
    flat = matrix().detach().view(-1)
    whole = selection.places(0, flat, (M, N))
    for edges in ([0, 1, 40, 40, 77, 120], [0, 33, 120], [0, 5, 6, 7, 120]):
        parts = [selection.places(a, flat[a:b], (M, N)) + a for a, b in itertools.pairwise(edges)]
        assert torch.equal(torch.cat(parts), whole)
        assert whole.dtype == torch.int32
