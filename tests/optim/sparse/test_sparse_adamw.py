"""What all sparse optimizers share: criteria against brute force, state packed and resumed, budgets, refusals."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from gracile.optim import (
    BlockSparseAdamW,
    RigLAdamW,
    SETAdamW,
    SparseAdamW,
    SRigLAdamW,
    full_state,
    load_full_state,
    param_groups,
    state_bytes,
)
from gracile.optim.memory import adamw_state_bytes, planned_state_by_kind, state_by_kind
from gracile.optim.sparse import masks
from gracile.optim.sparse import top_k as selection
from gracile.optim.sparse.layer_budgets import budgets_by_weight
from gracile.optim.sparse.top_k import LARGEST
from tests.oracle import sparse as oracle

ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6}
CLOCK = {"update_every": 4, "drop_fraction": 0.4, "t_end": 18}
SHAPES = {"tall": (24, 12), "wide": (12, 24), "square": (16, 16), "kernel": (8, 4, 3, 3), "experts": (3, 8, 12)}

MADE = {
    "SET": (SETAdamW, {}),
    "RigL": (RigLAdamW, {}),
    "SRigL": (SRigLAdamW, {"gamma_sal": 0.9}),
    "BLaST": (BlockSparseAdamW, {"block_size": 2}),
    "lamp": (SparseAdamW, {"distribution": "lamp"}),
    "momentum": (SparseAdamW, {"grow": "momentum", "initial_sparsity": 0.2}),
    "gradient magnitude": (SparseAdamW, {"drop": "gradient_magnitude", "distribution": "er", "grow": "random"}),
    "random rows": (SparseAdamW, {"drop": "random", "grow": "random", "structure": "constant_fan_in"}),
}

by_method = pytest.mark.parametrize("name", MADE)
by_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def weights(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((0.3 * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype)) for s in shapes]


def four(dtype=torch.float32, seed=0):
    return weights((24, 12), (12, 24), (16, 16), (10,), dtype=dtype, seed=seed)


def made(name, held, **keys):
    """Matrices in two groups of different sparsity, a vector in a third."""
    cls, own = MADE[name]
    groups = [{"params": held[:2], "sparsity": 0.6}, {"params": held[2:3], "sparsity": 0.75}, {"params": held[3:]}]
    return cls([group for group in groups if group["params"]], **{**ADAM, **CLOCK, "weight_decay": 0.1, **own, **keys})


def gradients(held, t):
    staying, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(1000 + t)
    both = [[torch.randn(p.shape, generator=g, dtype=torch.float64) for p in held] for g in (staying, noise)]
    return [(a + b).to(p.dtype) for a, b, p in zip(*both, held, strict=True)]


def held_by(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def advance(optimizer, first, last):
    """Steps ``first`` to ``last - 1``."""
    for t in range(first, last):
        held = held_by(optimizer)
        for p, G in zip(held, gradients(held, t), strict=True):
            p.grad = G
        optimizer.step()


def mask_of(optimizer, p):
    mask = torch.zeros(p.numel(), dtype=torch.bool)
    mask[optimizer.state[p]["indices"].long()] = True
    return mask.view(p.shape)


def assert_identical(one, other):
    for a, b in zip(held_by(one), held_by(other), strict=True):
        assert torch.equal(a, b)
        assert one.state[a].keys() == other.state[b].keys()
        for key, value in one.state[a].items():
            assert value.dtype == other.state[b][key].dtype
            assert torch.equal(value, other.state[b][key])


def assert_masked(optimizer):
    for p in held_by(optimizer):
        if "indices" in optimizer.state[p]:
            assert not p[~mask_of(optimizer, p)].any()


# ---- what goes and what comes, on 6 x 6 -----------------------------------------------------------------------------


def one_change(drop, grow, dtype=torch.float32, **keys):
    """A mask of 18, of which 7 go, by weights and gradients without a step's doing."""
    (p,) = weights((6, 6), dtype=dtype)
    (G,) = gradients([p], 0)
    options = {"drop": drop, "grow": grow, "sparsity": 0.5, "update_every": 1, "drop_fraction": 0.39}
    options |= {"schedule": "constant", "lr": 0.0, **keys}
    optimizer = SparseAdamW([p], **options)
    old, W = p.detach() != 0, p.detach().clone()
    p.grad = G
    optimizer.step()
    return W, old, G, mask_of(optimizer, p), optimizer


@by_dtype
@pytest.mark.parametrize("grow", ["gradient", "momentum"])
@pytest.mark.parametrize("drop", ["magnitude", "gradient_magnitude"])
def test_each_choice_is_that_of_a_sort(drop, grow, dtype):
    """Momentum after one step is the gradient."""
    W, old, G, new, _ = one_change(drop, grow, dtype, drop_lambda=0.7)
    worth = W.abs().double() + (0.7 * G.abs().double() if drop == "gradient_magnitude" else 0)
    kept = oracle.best(worth, old, 11)
    assert torch.equal(new, kept | oracle.best(G.abs().double(), ~kept, 7))
    assert old.sum() == new.sum() == 18


def test_a_random_drop_leaves_any_and_as_often():
    """With reinit_when_same, what was kept is what is not zero."""
    counted, among = torch.zeros(36), torch.zeros(36)
    for seed in range(150):
        _, old, _, new, optimizer = one_change("random", "gradient", seed=seed, reinit_when_same=True)
        p = held_by(optimizer)[0]
        kept = p.detach() != 0
        assert kept.sum() == 11
        assert new.sum() == 18
        counted += kept.flatten()
        among += old.flatten()
    assert (counted / among - 11 / 18).abs().max() < 4.5 * math.sqrt(11 / 18 * 7 / 18 / 60)


def test_a_random_drop_is_drawn_anew_at_every_update():
    """After 15 of them no first weight is left; its chance is 18 / 2^15."""
    (p,) = weights((6, 6))
    keys = {"drop": "random", "grow": "random", "schedule": "constant", "reinit_when_same": True}
    optimizer = SparseAdamW([p], lr=0.0, sparsity=0.5, update_every=1, drop_fraction=0.5, **keys)
    advance(optimizer, 0, 15)
    assert mask_of(optimizer, p).sum() == 18
    assert not p.any()


def test_momentum_is_an_average_of_all_gradients():
    held = weights((12, 10))
    optimizer = SparseAdamW(held, **ADAM, **CLOCK, sparsity=0.8, grow="momentum")
    expected = torch.zeros(12, 10, dtype=torch.float64)
    for t in range(9):
        old = mask_of(optimizer, held[0]) if t else held[0].detach() != 0
        advance(optimizer, t, t + 1)
        expected = 0.8 * expected + 0.2 * gradients(held, t)[0].double()
        torch.testing.assert_close(optimizer.state[held[0]]["momentum"].view(12, 10).double(), expected)
        new = mask_of(optimizer, held[0])
        if (t + 1) % 4 == 0:
            assert expected.abs()[new & ~old].min() >= expected.abs()[~new].max()
    assert new.sum() == 24


def test_a_gradient_decides_between_equal_weights_of_bf16():
    """A thousandth of it is less than the last bit of a weight."""
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    keys = {"drop": "gradient_magnitude", "grow": "random", "reinit_when_same": True, "schedule": "constant"}
    optimizer = SparseAdamW([p], lr=0.0, sparsity=0.0, update_every=1, drop_fraction=0.25, **keys)
    p.grad = torch.arange(16.0).view(4, 4).bfloat16() / 16
    optimizer.step()
    assert p.flatten().tolist() == [0.0] * 4 + [1.0] * 12


@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("structure", ["unstructured", "constant_fan_in"])
def test_momentum_of_another_dtype_than_the_weights_is_compared_by_value(dtype, state_dtype, structure):
    """Keys of 32 bits and of 64 do not mix; two groups of one lot."""
    held = weights((6, 8), (6, 8), dtype=dtype)
    groups = [{"params": held[:1], "state_dtype": state_dtype}, {"params": held[1:]}]
    keys = {"structure": structure, "sparsity": 0.5, "grow": "momentum", "schedule": "constant"}
    keys |= {"gamma_sal": 0} if structure == "constant_fan_in" else {}
    optimizer = SparseAdamW(groups, lr=0.0, update_every=1, drop_fraction=1.0, **keys)
    advance(optimizer, 0, 1)
    for p, G in zip(held, gradients(held, 0), strict=True):
        if structure == "unstructured":
            expected = oracle.best(G.abs(), torch.ones(6, 8, dtype=torch.bool), 24)
        else:
            expected = torch.stack([oracle.best(row.abs(), torch.ones(8, dtype=torch.bool), 4) for row in G])
        assert torch.equal(mask_of(optimizer, p), expected)


@by_method
@by_dtype
def test_large_matrices_are_chosen_from_in_parts_and_on_a_gpu_by_sorting(monkeypatch, name, dtype):
    runs = []
    for at_once, on_a_gpu in ((2**20, False), (50, False), (50, True)):
        monkeypatch.setattr(selection, "launches_cost", lambda device, is_one=on_a_gpu: is_one)
        monkeypatch.setattr(selection, "AT_ONCE", at_once)
        optimizer = made(name, four(dtype))
        advance(optimizer, 0, 10)
        runs.append(optimizer)
    assert_identical(*runs[:2])
    assert_identical(*runs[1:])


@pytest.mark.parametrize("structure", ["unstructured", "constant_fan_in", "block"])
def test_a_weight_that_is_there_comes_before_any_that_is_drawn(monkeypatch, structure):
    """Though the draw be the largest of all."""
    monkeypatch.setattr(masks, "random_keys", lambda units, *_: torch.full_like(units, LARGEST[torch.int32]).int())
    p = nn.Parameter(torch.zeros(4, 8))
    p.data[:, 6:] = 1
    SparseAdamW([p], sparsity=0.75, structure=structure, drop_fraction=0.0, **BLOCKS.get(structure, {}))
    assert (p[:, 6:] == 1).all()


BLOCKS = {"block": {"block_size": 2}}


# ---- zeros outside of masks -----------------------------------------------------------------------------------------


@by_method
@by_dtype
def test_weights_outside_of_masks_are_zero_from_the_first_pass_on(name, dtype):
    held = four(dtype)
    start = [p.detach().clone() for p in held]
    optimizer = made(name, held)
    initial = [(p != 0) for p in held]
    assert all(torch.equal(p[there], s[there]) for p, s, there in zip(held, start, initial, strict=True))
    for t in range(20):
        advance(optimizer, t, t + 1)
        assert_masked(optimizer)
        if t == 0:
            assert all(torch.equal(mask_of(optimizer, p), m) for p, m in zip(held[:3], initial[:3], strict=True))


@by_method
def test_a_state_loaded_into_other_weights_holds_them_to_its_masks(name):
    source = made(name, four())
    advance(source, 0, 5)
    held = four(seed=9)
    optimizer = made(name, held)
    advance(optimizer, 0, 2)
    for p, other in zip(held, four(seed=10), strict=True):
        p.data.copy_(other.detach())
    optimizer.load_state_dict(source.state_dict())
    advance(optimizer, 5, 6)
    assert_masked(optimizer)
    for p, q in zip(held, held_by(source), strict=True):
        if p.dim() > 1:
            assert torch.equal(optimizer.state[p]["indices"], source.state[q]["indices"])


def test_also_those_that_have_no_gradient_in_the_next_step():
    source = made("RigL", four())
    advance(source, 0, 5)
    optimizer = made("RigL", four(seed=9))
    held = held_by(optimizer)
    advance(optimizer, 0, 2)
    for p, other in zip(held, four(seed=10), strict=True):
        p.data.copy_(other.detach())
    optimizer.load_state_dict(source.state_dict())
    for part in (held[:1], held[1:]):
        for p in held:
            p.grad = torch.ones_like(p) if any(p is q for q in part) else None
        optimizer.step()
    assert_masked(optimizer)


@by_method
def test_weights_loaded_between_the_optimizer_and_its_first_step_are_masked_then(name):
    held = four()
    optimizer = made(name, held)
    for p, other in zip(held, four(seed=3), strict=True):
        p.data.copy_(other.detach())
    advance(optimizer, 0, 1)
    assert_masked(optimizer)


@pytest.mark.parametrize("name", ["SET", "RigL", "BLaST"])
def test_sparse_weights_loaded_then_keep_their_places(name):
    """The masks that were drawn for the weights before are forgotten."""
    keys = {"initial_sparsity": None} if name == "BLaST" else {}
    trained = made(name, four(seed=3), **keys)
    advance(trained, 0, 10)
    held = four()
    optimizer = made(name, held, **keys)
    for p, q in zip(held, held_by(trained), strict=True):
        p.data.copy_(q.detach())
    advance(optimizer, 0, 1)
    for p, q in zip(held[:3], held_by(trained), strict=False):
        assert torch.equal(mask_of(optimizer, p) & (q != 0), q != 0)


# ---- first masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SET", "RigL", "BLaST", "momentum"])
def test_a_model_of_trained_sparse_weights_keeps_them(name):
    keys = {"initial_sparsity": None} if name in ("BLaST", "momentum") else {}
    trained = made(name, four(), **keys)
    advance(trained, 0, 10)
    held = [nn.Parameter(p.detach().clone()) for p in held_by(trained)]
    again = made(name, held, **keys)
    assert all(torch.equal(p, q) for p, q in zip(held, held_by(trained), strict=True))
    advance(again, 0, 1)
    for p, q in zip(held[:3], held_by(trained), strict=False):
        assert torch.equal(mask_of(again, p) & (q != 0), q != 0)
        assert mask_of(again, p).sum() == mask_of(trained, q).sum()


def test_a_sparser_model_keeps_all_of_its_weights_and_gets_others():
    p = nn.Parameter(torch.zeros(10, 10))
    p.data[::3, ::4] = 1
    SETAdamW([p], sparsity=0.5, t_end=9)
    optimizer = SETAdamW([p], sparsity=0.5, t_end=9)
    advance(optimizer, 0, 1)
    mask = mask_of(optimizer, p)
    assert mask[::3, ::4].all()
    assert mask.sum() == 50


def test_a_denser_model_is_cut_to_size_at_random_or_by_magnitude():
    held = weights((20, 12))
    order = oracle.best(held[0].detach().abs(), torch.ones(20, 12, dtype=torch.bool), 60)
    SETAdamW(held, sparsity=0.75, t_end=9, init="magnitude")
    assert torch.equal(held[0] != 0, order)


@pytest.mark.parametrize("kind", ["lamp", "global"])
def test_masks_by_weight_are_of_the_largest_and_their_sum_is_exact(kind):
    held = weights((20, 12), (12, 20), (16, 16))
    held[1].data.mul_(0.1)
    start = [p.detach().clone() for p in held]
    expected = budgets_by_weight(start, 0.3, kind)
    optimizer = SparseAdamW(held, **ADAM, **CLOCK, density=0.3, distribution=kind)
    for t in range(10):
        for p, W, k in zip(held, start, expected, strict=True):
            if t == 0:
                assert torch.equal(p != 0, oracle.best(W.abs(), torch.ones_like(W, dtype=torch.bool), k))
            else:
                assert len(optimizer.state[p]["indices"]) == k
        advance(optimizer, t, t + 1)
    assert sum(expected) == round(0.3 * 736)


@pytest.mark.parametrize(
    ("cls", "own"), [(SETAdamW, {}), (SRigLAdamW, {}), (BlockSparseAdamW, {"block_size": 2, "initial_sparsity": None})]
)
def test_weights_are_made_larger_once_where_fan_in_asks_for_it(cls, own):
    held, plain = weights((20, 12)), weights((20, 12))
    optimizer = cls(held, **{**ADAM, "lr": 0.0}, **own, sparsity=0.75, t_end=9, rescale_init=True)
    cls(plain, **own, sparsity=0.75, t_end=9)
    for _ in range(3):
        torch.testing.assert_close(held[0], 2 * plain[0])
        advance(optimizer, 0, 1)


# ---- budgets over time and over matrices ----------------------------------------------------------------------------


def test_the_total_of_a_group_is_constant_over_updates():
    """Published code rounds each matrix down, or draws each weight by itself."""
    held = weights((50, 7), (7, 50), (31, 13), (64, 64))
    optimizer = SETAdamW(held, **ADAM, **CLOCK, sparsity=0.9)
    total = round(0.1 * sum(p.numel() for p in held))
    assert sum(int((p != 0).sum()) for p in held) == total
    for t in range(14):
        advance(optimizer, t, t + 1)
        assert sum(len(optimizer.state[p]["indices"]) for p in held) == total


def test_sparsity_rises_by_a_cubic_and_every_matrix_by_its_own_clock():
    """The second gets its first gradient later."""
    held = weights((16, 16), (16, 16))
    optimizer = SparseAdamW(held, **ADAM, update_every=4, t_end=16, sparsity=0.75, initial_sparsity=0.0)
    counts = []
    for t in range(22):
        for p, G in zip(held, gradients(held, t), strict=True):
            p.grad = G
        if t < 4:
            held[1].grad = None
        optimizer.step()
        counts.append([len(optimizer.state[p]["indices"]) for p in held])
    ramp = [round((0.25 + 0.75 * (1 - t / 16) ** 3) * 512) / 2 for t in (0, 4, 8, 12, 16)]
    assert [counts[t][0] for t in (0, 4, 8, 12, 16)] == pytest.approx(ramp, abs=0.5)
    assert [counts[t + 4][1] for t in (0, 4, 8, 12, 16)] == pytest.approx(ramp, abs=0.5)
    assert counts[2][1] == 0


def test_a_sparsity_that_is_changed_holds_from_the_next_update_on():
    held = weights((20, 12))
    optimizer = RigLAdamW(held, **ADAM, **CLOCK, sparsity=0.5)
    advance(optimizer, 0, 5)
    optimizer.param_groups[0]["sparsity"] = 0.9
    advance(optimizer, 5, 7)
    assert len(optimizer.state[held[0]]["indices"]) == 120
    advance(optimizer, 7, 8)
    assert len(optimizer.state[held[0]]["indices"]) == 24
    assert_masked(optimizer)
    optimizer.param_groups[0]["sparsity"] = 0.6
    advance(optimizer, 8, 12)
    assert len(optimizer.state[held[0]]["indices"]) == 96
    assert held[0].count_nonzero() <= 24
    assert_masked(optimizer)


@pytest.mark.parametrize(("t_begin", "changes"), [(0, {4, 8}), (4, {8}), (5, {8})])
def test_masks_change_between_t_begin_and_t_end_alone(t_begin, changes):
    """With a fraction that does not fall, too."""
    held = weights((20, 12))
    keys = {"grow": "random", "schedule": "constant", "update_every": 4, "t_begin": t_begin, "t_end": 12}
    optimizer = SparseAdamW(held, **ADAM, sparsity=0.5, **keys)
    advance(optimizer, 0, 1)
    seen, old = set(), mask_of(optimizer, held[0])
    for t in range(1, 26):
        advance(optimizer, t, t + 1)
        new = mask_of(optimizer, held[0])
        if not torch.equal(new, old):
            seen.add(t + 1)
        old = new
    assert seen == changes


def test_freezing_a_matrix_leaves_the_others_their_weights():
    """Also where the frozen one still has a gradient."""
    held = weights((40, 40), (6, 8))
    optimizer = RigLAdamW(held, **ADAM, **CLOCK, sparsity=0.8)
    advance(optimizer, 0, 2)
    counts = [len(optimizer.state[p]["indices"]) for p in held]
    held[0].requires_grad_(False)
    advance(optimizer, 2, 9)
    assert [len(optimizer.state[p]["indices"]) for p in held] == counts


def test_a_drop_fraction_of_zero_is_static_to_the_bit():
    still, never = made("RigL", four(), drop_fraction=0.0), made("RigL", four(), update_every=1000)
    advance(still, 0, 12)
    advance(never, 0, 12)
    assert_identical(still, never)
    moving = made("RigL", four())
    advance(moving, 0, 12)
    assert not torch.equal(held_by(moving)[0], held_by(still)[0])


# ---- state ----------------------------------------------------------------------------------------------------------


@by_method
@by_dtype
def test_state_is_as_long_as_the_mask(name, dtype):
    optimizer = made(name, four(dtype))
    advance(optimizer, 0, 10)
    for p in held_by(optimizer):
        state = optimizer.state[p]
        packed = {"step", "exp_avg", "exp_avg_sq"}
        if p.dim() > 1:
            packed |= {"indices"} | ({"momentum"} if name == "momentum" else set())
            assert state["indices"].dtype == torch.int32
            assert len(state["exp_avg"]) == len(state["exp_avg_sq"]) == len(state["indices"])
        assert state.keys() == packed
        for value in state.values():
            assert type(value) is torch.Tensor
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@pytest.mark.parametrize("cls", [SETAdamW, RigLAdamW, SRigLAdamW])
def test_at_ninety_percent_state_is_a_sixth_of_adamws(cls):
    """Two moments and an index of four bytes each for a tenth of the weights: 0.15 of two moments for all."""
    held = weights((120, 80), (80, 120))
    optimizer = cls(held, **ADAM, **CLOCK, sparsity=0.9)
    advance(optimizer, 0, 9)
    assert state_bytes(optimizer) <= 0.155 * adamw_state_bytes(held)


@by_method
def test_bytes_are_planned_and_told_in_advance(name):
    """For lamp, in all: its masks are as large as weights say."""
    real = made(name, four())
    advance(real, 0, 1)
    with torch.device("meta"):
        empty = [nn.Parameter(torch.empty(p.shape)) for p in four()]
    planned = planned_state_by_kind(made(name, empty))
    if name != "lamp":
        assert planned == state_by_kind(real)
    assert planned.total() == pytest.approx(state_bytes(real), abs=12 * 3)


def test_real_weights_are_masked_under_a_meta_device_too():
    """Some models are built on the CPU whatever the default device is."""
    held = four()
    with torch.device("meta"):
        made("RigL", held)
    assert int((held[0] == 0).sum()) > 100


@pytest.mark.parametrize("cls", [SETAdamW, RigLAdamW, SRigLAdamW, SparseAdamW, BlockSparseAdamW])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@by_dtype
def test_bytes_for_one_matrix_are_those_of_a_step(cls, shape, dtype):
    keys = {**CLOCK, "sparsity": 0.7} | ({"block_size": 4} if cls is BlockSparseAdamW else {})
    held = weights(shape, dtype=dtype)
    optimizer = cls(held, **keys)
    advance(optimizer, 0, 1)
    assert cls.state_bytes_for(shape, dtype, **keys) == state_bytes(optimizer)


def test_bf16_moments_on_request():
    held = weights((20, 12), dtype=torch.bfloat16)
    optimizer = RigLAdamW(held, **ADAM, **CLOCK, sparsity=0.75, state_dtype=torch.bfloat16)
    advance(optimizer, 0, 9)
    assert state_bytes(optimizer) == 60 * (4 + 2 + 2) + 4


@by_method
@by_dtype
@pytest.mark.parametrize("at", [3, 4, 6])
def test_a_run_resumed_from_a_file_keeps_every_bit(name, dtype, at, tmp_path):
    undisturbed = made(name, four(dtype))
    advance(undisturbed, 0, at)
    torch.save([undisturbed.state_dict(), [p.detach() for p in held_by(undisturbed)]], tmp_path / "run.pt")
    saved, trained = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = made(name, four(dtype, seed=5))
    for p, W in zip(held_by(resumed), trained, strict=True):
        p.data.copy_(W)
    resumed.load_state_dict(saved)
    assert_identical(resumed, undisturbed)
    advance(undisturbed, at, 13)
    advance(resumed, at, 13)
    assert_identical(resumed, undisturbed)


@by_method
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("at", [0, 6])
def test_a_copy_goes_on_as_the_original_does(name, duplicate, at):
    original = made(name, four())
    advance(original, 0, at)
    twin = duplicate(original)
    late = [weights((12, 8), seed=4)[0] for _ in range(2)]
    for one, p in zip((original, twin), late, strict=True):
        one.add_param_group({"params": [p], "sparsity": 0.5})
        assert (p == 0).any() == (name not in ("BLaST",))
        advance(one, at, at + 8)
    assert_identical(original, twin)


@by_method
def test_full_state_moves_to_a_new_optimizer(name):
    source = made(name, four())
    advance(source, 0, 6)
    saved = full_state(source)
    assert saved["parameters"][0]["mask"].shape == (24, 12)
    assert "indices" not in saved["parameters"][0]
    held = [nn.Parameter(p.detach().clone()) for p in held_by(source)]
    target = made(name, held)
    for p, q in zip(held, held_by(source), strict=True):
        p.data.copy_(q.detach())
    load_full_state(target, saved)
    assert_identical(source, target)
    advance(source, 6, 13)
    advance(target, 6, 13)
    assert_identical(source, target)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: state["exp_avg"].resize_(5), "does not fit RigLAdamW"),
        (lambda state: state.pop("indices"), "does not fit RigLAdamW"),
        (lambda state: state.__setitem__("momentum", torch.zeros(288)), "does not fit RigLAdamW"),
        (lambda state: state["indices"][-1:].fill_(288), r"places outside of a parameter of shape \(24, 12\)"),
        (lambda state: state["indices"][:1].fill_(-1), r"places outside of a parameter of shape \(24, 12\)"),
        (lambda state: state.__setitem__("indices", state["indices"].view(1, -1)), "does not fit RigLAdamW"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage, words):
    optimizer = made("RigL", four())
    advance(optimizer, 0, 5)
    before, saved = copy.deepcopy(optimizer), copy.deepcopy(optimizer.state_dict())
    damage(saved["state"][0])
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert_identical(optimizer, before)


def test_a_state_of_another_sparsity_brings_its_own():
    source = RigLAdamW(weights((20, 12)), **ADAM, **CLOCK, sparsity=0.5)
    advance(source, 0, 5)
    target = RigLAdamW(weights((20, 12)), **ADAM, **CLOCK, sparsity=0.9)
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["sparsity"] == 0.5
    advance(target, 5, 9)
    assert len(target.state[held_by(target)[0]]["indices"]) == 120


# ---- in a loop ------------------------------------------------------------------------------------------------------


def test_two_halves_of_a_batch_are_the_batch():
    """Accumulated gradients are what growth ranks."""
    runs = []
    for parts in (1, 2):
        held = weights((20, 12), (12, 20), dtype=torch.float64)
        optimizer = RigLAdamW(held, **ADAM, **CLOCK, sparsity=0.8)
        for t in range(9):
            optimizer.zero_grad()
            for part in range(parts):
                halves = [gradients(held, 100 * t + i) for i in (range(2) if parts == 1 else [part])]
                sum((p * sum(Gs)).sum() for p, *Gs in zip(held, *halves, strict=True)).backward()
            optimizer.step()
        runs.append([mask_of(optimizer, p) for p in held])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@by_method
def test_parameters_without_a_gradient_at_first_wait_with_an_empty_state(name):
    held = four()
    optimizer = made(name, held)
    masked = held[1].detach().clone()
    for t in range(6):
        for p, G in zip(held, gradients(held, t), strict=True):
            p.grad = None if p is held[1] and t < 2 else G
        optimizer.step()
        if t < 2:
            assert optimizer.state[held[1]]["step"] == 0
            assert torch.equal(held[1], masked)
            saved = optimizer.state_dict()
            optimizer.load_state_dict(saved)
    assert optimizer.state[held[1]]["step"] == 4
    assert_masked(optimizer)


def test_groups_of_a_model():
    model = nn.Sequential(nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 20), nn.LayerNorm(20))
    optimizer = RigLAdamW(param_groups(model, target_modules=r"\d", sparsity=0.8), t_end=10)
    assert [group["sparsity"] for group in optimizer.param_groups] == [0.8, None]
    assert int((model[0].weight != 0).sum() + (model[2].weight != 0).sum()) == round(0.2 * (288 + 240))
    assert model[3].weight.all()
    optimizer = RigLAdamW(param_groups(model, target_modules=r"\d", density=0.1), sparsity=None, t_end=10)
    assert int((model[0].weight != 0).sum() + (model[2].weight != 0).sum()) == round(0.1 * (288 + 240))


@by_dtype
def test_a_gradient_that_is_not_contiguous_is_read_in_the_order_of_the_weights(dtype):
    runs = []
    for strided in (False, True):
        held = weights((20, 12), (8, 4, 3, 3), dtype=dtype)
        optimizer = RigLAdamW(held, **ADAM, **CLOCK, sparsity=0.8)
        for t in range(9):
            for p, G in zip(held, gradients(held, t), strict=True):
                p.grad = G.transpose(0, 1).contiguous().transpose(0, 1) if strided else G
            optimizer.step()
        runs.append(optimizer)
    assert_identical(*runs)


def test_everything_or_nothing():
    for sparsity, count in ((0.0, 240), (1.0, 0)):
        held = weights((20, 12))
        optimizer = RigLAdamW(held, **ADAM, **CLOCK, sparsity=sparsity)
        advance(optimizer, 0, 9)
        assert len(optimizer.state[held[0]]["indices"]) == held[0].count_nonzero() == count


# ---- refusals -------------------------------------------------------------------------------------------------------

BAD = [
    ("sparsity", 1.1, r"\[0, 1\]"),
    ("sparsity", -0.1, r"\[0, 1\]"),
    ("sparsity", float("nan"), r"\[0, 1\]"),
    ("sparsity", True, r"\[0, 1\]"),
    ("sparsity", "half", r"\[0, 1\]"),
    ("sparsity", [0.5], r"\[0, 1\]"),
    ("initial_sparsity", 1.5, r"\[0, 1\]"),
    ("drop", "smallest", "magnitude, gradient_magnitude, random"),
    ("grow", "gradients", "gradient, momentum, random"),
    ("distribution", "ERK", "uniform, er, erk, lamp, global"),
    ("schedule", "linear", "constant, cosine, cubic"),
    ("structure", "blocks", "unstructured, constant_fan_in, block"),
    ("init", "dense", "random, magnitude, smallest, None"),
    ("update_every", 0, "whole number >= 1"),
    ("update_every", 2.5, "whole number >= 1"),
    ("drop_fraction", 1.5, r"\[0, 1\]"),
    ("drop_fraction", -0.5, r"\[0, 1\]"),
    ("t_begin", -1, "whole number >= 0"),
    ("t_end", 0, "whole number > t_begin"),
    ("t_end", 2.5, "whole number > t_begin"),
    ("drop_lambda", -1.0, ">= 0"),
    ("seed", -1, "whole number >= 0"),
    ("seed", 0.5, "whole number >= 0"),
    ("reinit_when_same", 1, "True or False"),
    ("rescale_init", None, "True or False"),
    ("gamma_sal", 0.3, "is for structure='constant_fan_in', got 'unstructured'"),
    ("block_size", 4, "is for structure='block', got 'unstructured'"),
    ("lr", -1.0, ">= 0"),
    ("betas", (0.9, 1.0), r"\[0, 1\)"),
    ("state_dtype", torch.int32, "floating point"),
]


@pytest.mark.parametrize(("key", "value", "words"), BAD, ids=[f"{key}={value}" for key, value, _ in BAD])
def test_a_value_out_of_range_is_refused_in_one_line(key, value, words):
    """By the constructor and in a group, with the name, the value and what would do."""
    options = {"sparsity": 0.5, "t_end": 9, key: value}
    for construct in (
        lambda: SparseAdamW(weights((20, 12)), **options),
        lambda: SparseAdamW([{"params": weights((20, 12)), **options}]),
    ):
        with pytest.raises(ValueError, match=words) as error:
            construct()
        assert key in str(error.value)
        assert repr(value) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"density": 0.5}, r"sparsity and density say the same; give one, got \(0.5, 0.5\)"),
        ({"t_end": None}, "t_end must be the step of the last change .* schedule='cosine' .* got None"),
        ({"t_end": None, "schedule": "constant", "initial_sparsity": 0.1}, "t_end must be .* initial_sparsity=0.1"),
        ({"t_begin": 9}, "t_end must be a whole number > t_begin or None, got 9"),
        ({"distribution": "lamp", "structure": "constant_fan_in"}, "lamp and global rank weights.* got 'lamp'"),
        ({"distribution": "global", "structure": "block", "block_size": 4}, "lamp and global.* got 'global'"),
        ({"distribution": "lamp", "init": "random"}, "lamp and global"),
        ({"distribution": "lamp", "initial_sparsity": 0.1}, "lamp and global"),
        ({"structure": "block", "block_size": 5}, r"block_size=5 does not divide both sides .* \(20, 12\)"),
        ({"structure": "constant_fan_in", "sparsity": 0.99}, "leaves 2 weights to the 20 rows"),
        ({"sparsty": 0.5}, None),
    ],
)
def test_values_that_do_not_go_together_are_refused(keys, words):
    with pytest.raises(ValueError if words else TypeError, match=words or "sparsty"):
        SparseAdamW(weights((20, 12)), **{"sparsity": 0.5, "t_end": 9, **keys})


@pytest.mark.parametrize("cls", [SETAdamW, RigLAdamW, SRigLAdamW, BlockSparseAdamW])
def test_what_a_method_has_chosen_is_no_key_of_its_groups(cls):
    for key, value in (("drop", "random"), ("structure", "block"), ("schedule", "constant")):
        with pytest.raises(ValueError, match=f"unknown parameter group key '{key}'"):
            cls([{"params": weights((64, 64)), "sparsity": 0.5, key: value}], t_end=9)
        with pytest.raises(TypeError, match=key):
            cls(weights((64, 64)), sparsity=0.5, t_end=9, **{key: value})


def test_parameters_that_cannot_be_masked_are_refused():
    options = {"sparsity": 0.5, "t_end": 9}
    with pytest.raises(ValueError, match=r"sparsity=0.5 needs matrices, got a parameter of shape \(5,\)"):
        RigLAdamW(weights((20, 12), (5,)), **options)
    strided = nn.Parameter(torch.ones(12, 20).t())
    with pytest.raises(ValueError, match=r"shape \(20, 12\) is not contiguous"):
        RigLAdamW([strided], **options)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        RigLAdamW(["weight"], **options)
    optimizer = RigLAdamW(weights((20, 12)), **options)
    with pytest.raises(ValueError, match="needs matrices"):
        optimizer.add_param_group({"params": weights((5,)), "sparsity": 0.5})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": weights((5,)), "sparsity": None})
    empty = nn.Parameter(torch.zeros(0, 5))
    assert len(RigLAdamW([empty, *weights((4, 4))], **options).param_groups[0]["params"]) == 2


def test_first_masks_are_drawn_once(monkeypatch):
    """When the optimizer is built. The first step reads them off the weights, which are then as many as they should be;
    weights that were loaded in between are drawn from anew."""
    drawn = []
    keys = masks.random_keys
    monkeypatch.setattr(masks, "random_keys", lambda *args: drawn.append(len(args[0])) or keys(*args))
    W = [nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))) for seed in range(2)]
    optimizer = SparseAdamW(W, sparsity=0.75, t_end=100)
    assert drawn
    there = W[0].detach() != 0
    with torch.no_grad():
        W[1].copy_(torch.randn(24, 16))
    drawn.clear()
    for p in W:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(drawn) - {0} == {W[1].numel()}
    assert torch.equal(optimizer.state[W[0]]["indices"].long(), there.view(-1).nonzero().view(-1))
    assert [len(optimizer.state[p]["indices"]) for p in W] == [96, 96]
