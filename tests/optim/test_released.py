"""Gradients that are freed in backward: each class as by an ordinary step, to the bit; one gradient at a time; and what
wants more than one is refused."""

import gc
import itertools
import sys
import weakref
from pathlib import Path

import pytest
import torch
from catalogue import VARIANTS
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from gracile import optim
from gracile.optim import release_gradients
from gracile.optim.core import batches
from gracile.optim.core.freed_gradient import FreedGradient
from gracile.optim.core.optimizer import ShardedOptimizer
from gracile.optim.core.projected_gradient import ProjectedGradient
from gracile.optim.distributed import FullShard, ProjectionSide, UnsupportedLayout, Workspace, blocked
from gracile.optim.low_rank.basis import Basis
from gracile.optim.low_rank.optimizer import LowRankOptimizer
from gracile.optim.released import kept_bytes
from gracile.optim.sparse.gather_scatter import Places
from gracile.optim.sparse.kept_entries import EntriesOfMask

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
cells = pytest.importorskip("cells", reason="needs DeepSpeed, as the cells of the distributed matrix do")

STEPS = 20  # refreshes, changes of masks, a pruning, merges
NAMES = [name for name, v in VARIANTS.items() if v.cells and issubclass(v.cls, ShardedOptimizer)]
FIRST = {VARIANTS[name].state: name for name in reversed(NAMES)}.values()  # one of each kind of state
WITH_EXPERTS = [  # but exact vectors, of which a stack of two is not a stack of three to the bit
    name
    for name in NAMES
    if not (VARIANTS[name].layer or VARIANTS[name].jumps or name.startswith(("SCALE", "SRSTE", "Cast")))
]


def trained(name, released, experts=0):
    cell = {"optimizer": name, "experts": experts}
    net = cells.build(cell)
    optimizer = cells.make_optimizer(net, cell, together=False)
    if released:
        release_gradients(net, optimizer, keep="nothing")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for step in range(STEPS):
        net(*cells.batch(step, 0)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return net, optimizer


def state_of(optimizer):
    return {(p, key): value for p, held in optimizer.state_dict()["state"].items() for key, value in held.items()}


EACH = [pytest.param(name, 0, id=name, marks=() if name in FIRST else pytest.mark.thorough) for name in NAMES]
EACH += [
    pytest.param(name, 3, id=f"{name}, experts", marks=() if name == "GaLoreAdamW" else pytest.mark.thorough)
    for name in WITH_EXPERTS
]


@pytest.mark.parametrize(("name", "experts"), EACH)
def test_each_class_moves_as_by_an_ordinary_step(name, experts):
    """With refreshes, mask changes, prunings and merges, and an expert that waits for its first token."""
    ordinary, released = trained(name, False, experts), trained(name, True, experts)
    for (key, one), other in zip(ordinary[0].named_parameters(), released[0].parameters(), strict=True):
        assert torch.equal(one, other), key
    one, other = map(state_of, (ordinary[1], released[1]))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value.nan_to_num(), other[key].nan_to_num()), key


# ---- what is freed --------------------------------------------------------------------------------------------------


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 24))


def galore(model, **keys):
    return optim.GaLoreAdamW(optim.param_groups(model, rank=4, target_modules="all-linear", update_proj_gap=3), **keys)


def loss_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 24, generator=generator), torch.randint(24, (16,), generator=generator)
    return cross_entropy(model(x), y)


def test_one_gradient_is_there_at_a_time_and_none_afterwards():
    model = small()
    optimizer, alive, most = galore(model, lr=0.01), [], []
    release_gradients(model, optimizer, keep="nothing")
    move = optimizer.move_early

    def watched(p):
        gc.collect()
        most.append(1 + sum(other() is not None for other in alive))
        alive.append(weakref.ref(p.grad))
        move(p)

    optimizer.move_early = watched
    for seed in range(4):
        loss_of(model, seed).backward()
        assert all(repr(p.grad) == f"FreedGradient({tuple(p.shape)})" for p in model.parameters())
        assert all(isinstance(p.grad, FreedGradient) and p.grad.shape == p.shape for p in model.parameters())
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
    assert set(most) == {1}
    assert len(most) == 4 * 6


def test_a_parameter_without_a_gradient_has_state_and_stays():
    model = small()
    model.unused = nn.Linear(24, 24)
    before = model.unused.weight.clone()
    model.forward = lambda x: nn.Sequential(*list(model)[:5])(x)
    optimizer = galore(model, lr=0.01)
    release_gradients(model, optimizer, keep="nothing")
    loss_of(model).backward()
    optimizer.step()
    assert torch.equal(model.unused.weight, before)
    assert {len(held) for held in optimizer.state.values()} == {3, 4}
    assert len(optimizer.state) == 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    def run(released):
        model = small()
        parts = list(model)

        def forward(x):
            x = parts[0](x)
            for part in parts[1:]:
                x = checkpoint(part, x, use_reentrant=reentrant)
            return x

        optimizer = galore(model, lr=0.01)
        if released:
            release_gradients(model, optimizer, keep="nothing")
        for seed in range(5):
            loss_of(forward, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    assert all(map(torch.equal, run(False), run(True)))


def test_hooks_that_are_removed_leave_an_ordinary_optimizer():
    one, other = small(), small()
    optimizers = galore(one, lr=0.01), galore(other, lr=0.01)
    released = release_gradients(other, optimizers[1], keep="nothing")
    for seed in range(6):
        if seed == 3:
            released.remove()
        for model, optimizer in zip((one, other), optimizers, strict=True):
            loss_of(model, seed).backward()
            assert isinstance(model[0].weight.grad, FreedGradient) == (model is other and seed < 3)
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_state_is_saved_and_loaded_between_steps():
    def run(at):
        model = small()
        optimizer = galore(model, lr=0.01)
        release_gradients(model, optimizer, keep="nothing")
        for seed in range(7):
            if seed == at:
                saved, weights = optimizer.state_dict(), model.state_dict()
                model = small(1)
                model.load_state_dict(weights)
                optimizer = galore(model, lr=0.01)
                optimizer.load_state_dict(saved)
                release_gradients(model, optimizer, keep="nothing")
            loss_of(model, seed).backward()
            optimizer.step()
        return list(model.parameters())

    assert all(map(torch.equal, run(None), run(4)))


# ---- coordinates ----------------------------------------------------------------------------------------------------

KEEPING = [name for name in NAMES if VARIANTS[name].cls.keeps_coordinates]
PROJECTED = [name for name in KEEPING if issubclass(VARIANTS[name].cls, LowRankOptimizer)]
MASKED = [name for name in KEEPING if name not in PROJECTED and name != "SparseAdamW"]  # whose masks grow by momentum


def reduced(name, keep, passes=1, clip=0.0, experts=0, told=None):
    """Weights after some steps, and the norm of each step's gradient."""
    net = cells.build({"optimizer": name, "experts": experts})
    optimizer = cells.make_optimizer(net, {"optimizer": name}, together=False)
    if keep:
        release_gradients(net, optimizer, keep=keep, passes=told)
    norms = []
    for step in range(STEPS):
        for micro in range(passes):
            (net(*cells.batch(step, micro)) / passes).backward()
        if clip:
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
    return list(net.parameters()), norms


def apart(one, other):
    return max(
        (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item() for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", PROJECTED)
def test_a_matrix_moves_by_the_coordinates_that_were_kept(name):
    """To the bit after one pass; after several, and clipped, to rounding."""
    assert len(PROJECTED) == 6
    for experts, told in ((0, None), (3, None), (0, 1)):
        one, other = (reduced(name, keep, experts=experts, told=told)[0] for keep in (None, "coordinates"))
        assert all(map(torch.equal, one, other))
    one, other = (reduced(name, keep, passes=4)[0] for keep in (None, "coordinates"))
    assert apart(one, other) <= 1e-6
    for told in (None, 1):
        (one, norms), (other, known) = (reduced(name, keep, clip=0.05, told=told) for keep in (None, "coordinates"))
        assert apart(one, other) <= 1e-5
        torch.testing.assert_close(torch.stack(known), torch.stack(norms), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MASKED)
def test_a_matrix_moves_by_the_entries_of_its_mask_that_were_kept(name):
    """To the bit, also where several passes are added, and with experts."""
    assert len(MASKED) == 5
    for experts, passes in ((0, 1), (0, 4), (3, 4)):
        one, other = (reduced(name, keep, passes, experts=experts)[0] for keep in (None, "coordinates"))
        assert all(map(torch.equal, one, other))
    (one, norms), (other, known) = (reduced(name, keep, clip=0.05) for keep in (None, "coordinates"))
    assert apart(one, other) <= 1e-5
    torch.testing.assert_close(torch.stack(known), torch.stack(norms), rtol=1e-5, atol=0)
    (one, norms), (other, known) = (reduced(name, keep, 4, 0.05) for keep in (None, "coordinates"))
    errors = torch.stack(known) / torch.stack(norms) - 1
    assert 0 < errors.abs().max() < 0.15
    assert apart(one, other) < 0.05


def masked(sparsity=0.9, dtype=torch.float32, shapes=((40, 24), (2, 24), (24, 3, 5), (3, 16, 8), (0, 7)), **keys):
    torch.manual_seed(0)
    held = nn.ParameterList([*(nn.Parameter(torch.randn(s).to(dtype)) for s in shapes), nn.Parameter(torch.zeros(5))])
    keys = {"grow": "random", "schedule": "constant", "update_every": 4, **keys}
    group = {"params": list(held)[:-1], "sparsity": sparsity}
    return held, optim.SparseAdamW([group, {"params": [held[-1]]}], lr=0.01, **keys)


def stepped(held, optimizer, step, passes=2):
    for micro in range(passes):
        chance = torch.Generator().manual_seed(100 * step + micro)
        sum((p * torch.randn(p.shape, generator=chance).to(p.dtype)).sum() for p in held if p.numel()).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "more",
    [
        {"sparsity": 0.0},
        {"dtype": torch.bfloat16, "stochastic_rounding": True, "maximize": True},
        {"grown_step": "own", "grown_warmup": 3, "weight_decay": 0.1},
        {"outside": "frozen", "decay_to": "start", "weight_decay": 0.1},
        {"structure": "block", "block_size": 16, "shapes": ((64, 32),)},
        {"drop": "gradient_magnitude"},
    ],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.parametrize("large", [False, True])
def test_masks_of_every_kind_move_by_entries(more, large, monkeypatch):
    """Large ones some entries at a time."""
    if large:
        monkeypatch.setattr(blocked, "LARGE", 40)
        monkeypatch.setattr(blocked, "BLOCK", 32)

    def run(keep):
        held, optimizer = masked(**more)
        if keep:
            release_gradients(held, optimizer, keep=keep)
        for step in range(10):
            stepped(held, optimizer, step)
            if keep and step % 4 != 3:
                assert sum(isinstance(p.grad, ProjectedGradient) for p in held) == sum(p.numel() > 5 for p in held)
            optimizer.zero_grad()
        return list(held)

    assert all(map(torch.equal, run(None), run("coordinates")))


def test_what_is_kept_of_masks():
    held, optimizer = masked()
    release_gradients(held, optimizer)
    loss_over(held).backward()
    kept = [[*p.grad.kept] if isinstance(p.grad, ProjectedGradient) else [p.grad] for p in held if p.grad is not None]
    assert kept_bytes(optimizer, "coordinates", None) == sum(tensor.nbytes for each in kept for tensor in each)
    assert kept_bytes(masked(grow="gradient")[1], "coordinates") == sum(p.nbytes for p in held)
    assert kept_bytes(masked(grow="gradient", drop_fraction=0)[1], "coordinates") < sum(p.nbytes for p in held)
    optimizer.step()
    loss_over(held).backward()  # adds to what is kept
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="entries of another mask were kept"):
        optimizer.step()
    held, optimizer = masked(grow="gradient")
    release_gradients(held, optimizer)
    for step in range(3):
        stepped(held, optimizer, step)
    with pytest.raises(RuntimeError, match="a mask changes by a gradient of which its entries were kept: zero_grad"):
        optimizer.step()
    momentum = masked(grow="momentum")
    with pytest.raises(UnsupportedLayout, match="grow='momentum' of SparseAdamW averages all of a gradient; give keep"):
        release_gradients(*momentum)


def loss_over(held):
    return sum(p.square().sum() for p in held if p.numel())


@pytest.mark.parametrize("shape", [(60, 90), (2, 90)])
def test_what_is_outside_of_a_mask_is_told_by_random_columns(shape):
    torch.manual_seed(0)
    G = torch.randn(shape)
    places = Places(FullShard(G, 0, Workspace()), {}, torch.arange(0, G.numel(), 10, dtype=torch.int32))
    kept = [EntriesOfMask(places, seed)(G) for seed in range(200)]
    assert torch.equal(kept[0].coordinates, G.view(-1)[::10])
    told = torch.stack([own.norm() for own in kept]) / torch.linalg.vector_norm(G)
    assert abs(told.square().mean() - 1) < 0.1
    assert 0.005 < told.std() < 0.15


def test_the_norm_over_several_passes_is_known_to_some_percent():
    (one, norms), (other, known) = (reduced("GaLoreAdamW", keep, 4, 0.05) for keep in (None, "coordinates"))
    errors = torch.stack(known) / torch.stack(norms) - 1
    assert 0 < errors.abs().max() < 0.06
    assert apart(one, other) < 0.01


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_what_is_outside_of_a_subspace_is_told_by_four_columns(shape):
    """Without a bias: the mean over many draws is the norm."""
    torch.manual_seed(0)
    P = torch.linalg.qr(torch.randn(60, 6))[0]
    G = torch.randn(shape, dtype=torch.float64).float()
    basis = Basis(P, ProjectionSide.of(shape, 6, "std"))
    exact = torch.linalg.vector_norm(G)
    told = torch.stack([basis.reduce(G, torch.randn(60, 4)).norm() for _ in range(200)]) / exact
    assert abs(told.square().mean() - 1) < 0.02
    assert 0.01 < told.std() < 0.1
    both = [basis.reduce(part, Z) for Z in [torch.randn(60, 4)] for part in (G, 2 * G, 3 * G)]  # linear in the gradient
    for a, b, sums in zip(*both, strict=True):
        torch.testing.assert_close(a + b, sums, rtol=1e-4, atol=1e-4)


def test_a_step_leaves_what_is_kept_as_it_is(monkeypatch):
    """As an ordinary step leaves gradients: without zero_grad the next pass adds to them. Large coordinates on a GPU
    may be used up; here all may."""
    monkeypatch.setattr(batches, "is_asked_in_spans", lambda *_: True)

    def run(keep):
        model = small()
        optimizer = galore(model, lr=0.01)
        if keep:
            release_gradients(model, optimizer, keep=keep)
        for seed in range(3):
            loss_of(model, seed).backward()
            optimizer.step()
            if seed == 0:
                optimizer.zero_grad()
        return list(model.parameters())

    assert apart(run(None), run("coordinates")) < 1e-6


@pytest.mark.parametrize("keep", ["coordinates", "nothing"])
def test_bf16_weights_are_rounded_by_the_same_chance(keep):
    def run(keep):
        model = small().bfloat16()
        optimizer = galore(model, lr=0.01, stochastic_rounding=True, state_dtype=torch.bfloat16)
        if keep:
            release_gradients(model, optimizer, keep=keep)
        for seed in range(7):
            x, y = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed)), torch.arange(16)
            cross_entropy(model(x.bfloat16()).float(), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    assert all(map(torch.equal, run(None), run(keep)))


@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("keep", ["coordinates", "nothing"])
def test_gradients_of_zeros_and_of_one_number_move_as_ever(keep, fill):
    """At the first refresh and later: the matrix waits for a gradient, or keeps its subspace."""

    def run(keep):
        W = nn.Parameter(torch.linspace(-1, 1, 24 * 40).view(24, 40))
        optimizer = optim.GaLoreAdamW([{"params": [W], "rank": 4, "update_proj_gap": 3}], lr=0.01)
        if keep:
            release_gradients(nn.ParameterList([W]), optimizer, keep=keep)
        chance = torch.Generator().manual_seed(0)
        for step in range(8):
            G = torch.randn(24, 40, generator=chance) if step in (2, 5) else torch.full((24, 40), fill)
            (W * G).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [W, *optimizer.state[W].values()]

    assert all(map(torch.equal, run(None), run(keep)))


def test_between_refreshes_only_coordinates_are_there():
    model = small()
    optimizer = galore(model, lr=0.01)
    release_gradients(model, optimizer)
    for seed in range(4):
        for _ in range(2):
            loss_of(model, seed).backward()
        for p in model.parameters():
            assert isinstance(p.grad, ProjectedGradient) == (p.dim() == 2 and seed % 3 > 0)
        if seed % 3:
            assert "coordinates (40, 4)" in repr(model[0].weight.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=seed < 2)


def test_with_one_pass_a_step_no_whole_gradient_of_a_matrix_stays():
    """Nor in a step with a refresh, whose subspace is found in the pass."""
    model = small()
    optimizer = galore(model, lr=0.01)
    release_gradients(model, optimizer, passes=1)
    bases = []
    for seed in range(7):
        loss_of(model, seed).backward()
        assert all(isinstance(p.grad, ProjectedGradient) == (p.dim() == 2) for p in model.parameters())
        held = [[*p.grad.kept] if p.dim() == 2 else [p.grad] for p in model.parameters()]
        optimizer.step()
        bases.append(optimizer.state[model[0].weight]["basis"].clone())
        optimizer.zero_grad()
    assert kept_bytes(optimizer, "coordinates") == sum(tensor.nbytes for each in held for tensor in each)
    assert kept_bytes(optimizer, "nothing") == 0
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(bases)] == [seed % 3 == 0 for seed in range(1, 7)]
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="passes=1; leave passes out"):
        loss_of(model).backward()
    with pytest.raises(ValueError, match="passes must be 1"):
        release_gradients(model, optimizer, passes=2)


@pytest.mark.parametrize("bad", [1, 3])
def test_a_scaler_skips_a_step_with_an_overflow_whole(bad):
    """In a step between refreshes, and in one with a refresh."""

    def run(keep):
        model = small()
        optimizer = galore(model, lr=0.01)
        if keep:
            release_gradients(model, optimizer, keep=keep)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for seed in range(7):
            loss = loss_of(model, seed) * (torch.inf if seed == bad else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert {int(held["step"]) for held in optimizer.state.values()} == {6}
        return list(model.parameters())

    assert apart(run(None), run("coordinates")) < 1e-6


def test_what_wants_more_than_coordinates_is_refused():
    model = small()
    for kind in (optim.FiraAdamW, optim.GaLorePlusAdamW, optim.LDAdamW):
        optimizer = kind(optim.param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
        with pytest.raises(UnsupportedLayout, match=f"{kind.__name__} needs more of a gradient.*keep='nothing'"):
            release_gradients(model, optimizer)
    optimizer = galore(model, lr=0.01)
    released = release_gradients(model, optimizer)
    for seed in range(2):
        loss_of(model, seed).backward()
        if seed == 0:
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"coordinates are kept, and torch's clamp.* wants all"):
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match="set_to_none=True"):
        model.zero_grad(set_to_none=False)
    optimizer.param_groups[0]["update_proj_gap"] = 1
    with pytest.raises(RuntimeError, match=r"its group or its state has changed.*change them after step\(\)"):
        optimizer.step()
    released.remove()


# ---- what is refused ------------------------------------------------------------------------------------------------


def released_small():
    model = small()
    optimizer = galore(model, lr=0.01)
    release_gradients(model, optimizer, keep="nothing")
    loss_of(model).backward()
    return model, optimizer


@pytest.mark.parametrize("foreach", [None, False])
def test_the_norm_of_all_is_known_and_clipping_by_it_is_refused(foreach):
    model, _ = released_small()
    other = small()
    loss_of(other).backward()
    expected = nn.utils.get_total_norm([p.grad for p in other.parameters()])
    for most in (torch.inf, 1.01 * expected.item()):  # as a Trainer asks for its log
        torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), most, foreach=foreach), expected)
    with pytest.raises(RuntimeError, match=r"freed in the backward pass.*max_grad_norm=0"):
        nn.utils.clip_grad_norm_(model.parameters(), 0.5 * expected.item(), foreach=foreach)
    with pytest.raises(RuntimeError, match="freed in the backward pass"):
        nn.utils.clip_grad_value_(model.parameters(), 1.0)


def test_a_grad_scaler_is_refused():
    model = small()
    optimizer = galore(model, lr=0.01)
    release_gradients(model, optimizer, keep="nothing")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(RuntimeError, match="bf16 without a scaler"):
        scaler.step(optimizer)


def test_a_second_pass_in_one_step_is_refused_and_the_next_step_is_whole():
    model, optimizer = released_small()
    with pytest.raises(RuntimeError, match=r"one pass a step|several passes a step"):
        loss_of(model, 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    optimizer.step()
    assert {int(held["step"]) for held in optimizer.state.values()} == {2}


def test_gradients_that_were_set_to_none_do_not_hide_a_second_pass():
    model, _ = released_small()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="came again before"):
        loss_of(model, 1).backward()


def test_a_layer_in_two_reentrant_checkpoints_is_refused():
    model = small()
    optimizer = galore(model, lr=0.01)
    release_gradients(model, optimizer, keep="nothing")
    twice = model[4]
    x = torch.randn(8, 24, requires_grad=True)
    y = checkpoint(twice, checkpoint(twice, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"reentrant|one pass a step"):
        y.square().sum().backward()


def test_a_pass_that_fails_leaves_a_step_that_zero_grad_ends():
    model = small()
    optimizer = galore(model, lr=0.01)
    release_gradients(model, optimizer, keep="nothing")
    handle = model[1].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model).backward()
    handle.remove()
    assert any(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    loss_of(model, 1).backward()
    optimizer.step()
    assert {int(held["step"]) for held in optimizer.state.values()} == {1, 2}


def test_what_cannot_be_released():
    model = small()
    optimizer = galore(model, lr=0.01)
    with pytest.raises(ValueError, match="keep must be"):
        release_gradients(model, optimizer, keep="all")
    with pytest.raises(TypeError, match=r"needs an optimizer of gracile\.optim, got AdamW"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UnsupportedLayout, match="capturable"):
        release_gradients(model, galore(model, lr=0.01, capturable=True))
    model[0].weight.ds_id = 0
    with pytest.raises(UnsupportedLayout, match="DeepSpeed owns"):
        release_gradients(model, optimizer, keep="nothing")


def test_parameters_that_come_later_are_refused_at_the_step():
    model = small()
    optimizer = galore(model, lr=0.01)
    release_gradients(model, optimizer, keep="nothing")
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    loss_of(model).backward()
    with pytest.raises(UnsupportedLayout, match="another one than when release_gradients was called"):
        optimizer.step()
