"""Methods override public verbs only, gather a matrix's lines once a step, and announce the phases of a step."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from gracile import optim
from gracile.models.convert import convert
from gracile.models.layers import ReLoRALinear, SpectralLinear
from gracile.optim.core.clock import every, since
from gracile.optim.core.group_checks import MATRIX_KEYS
from gracile.optim.core.optimizer import AFTER, COMMON_KEYS, FIND, UPDATE, ShardedOptimizer
from gracile.optim.distributed import FullMatrix, PrefixedState

CLASSES = [kind for name in optim.__all__ if isinstance(kind := getattr(optim, name), type)]
PUBLIC = [kind for kind in CLASSES if issubclass(kind, ShardedOptimizer)]


def kinds():
    """Every class on the way from a public one to the base."""
    return sorted({kind for public in PUBLIC for kind in public.__mro__ if issubclass(kind, ShardedOptimizer)}, key=str)


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_no_private_method_is_overridden(kind):
    if kind is ShardedOptimizer:
        return
    of_bases = {name for base in kind.__mro__[1:] if base.__module__.startswith("gracile") for name in vars(base)}
    private = {n for n, value in vars(kind).items() if n.startswith("_") and not n.startswith("__") and callable(value)}
    assert private & of_bases == set()


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_one_attribute_says_what_marks_a_group_of_matrices(kind):
    assert kind.matrix_key in (*MATRIX_KEYS, None)


def test_a_local_variable_of_a_constructor_is_no_key():
    class Own(optim.Lion):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, *, state_dtype=None):
            halved = lr / 2
            assert halved < lr
            ShardedOptimizer.__init__(self, params, locals())

    optimizer = Own([nn.Parameter(torch.ones(2))])
    assert set(optimizer.defaults) == {"lr", "betas", "weight_decay", "state_dtype", *COMMON_KEYS}


def test_a_matrix_is_gathered_once_a_step_at_a_refresh_too(monkeypatch):
    gathered = []
    gather = FullMatrix.gather_grad
    monkeypatch.setattr(FullMatrix, "gather_grad", lambda self: gathered.append(self.position) or gather(self))
    for kind in (optim.GaLoreAdamW, optim.GradNormLoRPAdamW, optim.FiraAdamW, optim.LDAdamW):
        matrices = [nn.Parameter(torch.randn(12, 8)) for _ in range(3)]
        keys = {} if kind is optim.LDAdamW else {"update_proj_gap": 1}
        optimizer = kind([{"params": matrices, "rank": 2, **keys}])
        for p in matrices:
            p.grad = torch.randn_like(p)
        gathered.clear()
        optimizer.step()
        assert gathered == [0, 1, 2], kind


def test_a_matrix_moves_before_the_next_one_is_gathered_for_its_subspace():
    """Where gradients are gathered from parts, all of them at once would be another model."""
    did = []

    class Watched(optim.GaLoreAdamW):
        def find_basis(self, G, shard, group, state):
            did.append(("find", shard.position))
            return super().find_basis(G, shard, group, state)

        def low_rank_direction(self, G, shard, group, state):
            did.append(("move", shard.position))
            return super().low_rank_direction(G, shard, group, state)

    matrices = [nn.Parameter(torch.randn(12, 8)) for _ in range(3)]
    optimizer = Watched([{"params": matrices, "rank": 2}])
    for p in matrices:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert did == [(what, position) for position in range(3) for what in ("find", "move")]


class Phases:
    """What a listener hears: (name, depth)."""

    def __init__(self):
        self.heard, self.depth = [], 0

    @contextmanager
    def __call__(self, name):
        self.heard.append((name, self.depth))
        self.depth += 1
        yield
        self.depth -= 1


FINDS = {
    "GaLoreAdamW": (optim.GaLoreAdamW, {}, {"rank": 2, "update_proj_gap": 3}, {0, 3}),
    "APOLLOAdamW": (optim.APOLLOAdamW, {}, {"rank": 2, "update_proj_gap": 3}, {0, 3}),
    "DCTAdamW": (optim.DCTAdamW, {}, {"rank": 2, "update_proj_gap": 3}, {0, 2, 5}),
    "LDAdamW": (optim.LDAdamW, {}, {"rank": 2}, {0, 1, 2, 3, 4, 5}),
    "RigLAdamW": (optim.RigLAdamW, {"update_every": 3, "t_end": 20}, {"sparsity": 0.5}, {0, 2, 5}),
    "CastAdamS": (optim.CastAdamS, {"n": None, "total_steps": 5}, {"n": 2, "m": 4, "mask_every": 3}, {0, 3, 4}),
    "HyperSparseAdamW": (optim.HyperSparseAdamW, {"quantile_every": 4, "prune_at": 6}, {"sparsity": 0.5}, {0, 4, 5}),
    "Lion": (optim.Lion, {}, {}, set()),
}


@pytest.mark.parametrize("case", FINDS.values(), ids=FINDS)
def test_a_listener_hears_of_a_new_subspace_or_mask_when_there_is_one(case):
    kind, keys, matrix_keys, steps = case
    W = nn.Parameter(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))
    optimizer, found = kind([{"params": [W], **matrix_keys}], **keys), set()
    for step in range(6):
        W.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
        optimizer.phase_listener = phases = Phases()
        optimizer.step()
        assert phases.depth == 0
        assert [name for name, depth in phases.heard if depth == 0 and name != FIND] == [UPDATE, AFTER]
        found |= {step} if FIND in {name for name, _ in phases.heard} else set()
    assert found == steps


LAYERED = {
    "SSTAdamW": (optim.SSTAdamW, SpectralLinear, {"swap_every": 3, "warmup_steps": 1}, {2, 5}),
    "ReLoRAAdamW": (optim.ReLoRAAdamW, ReLoRALinear, {"merge_every": 3, "reset_every": 2}, {1, 2, 3, 5}),
}


@pytest.mark.parametrize("case", LAYERED.values(), ids=LAYERED)
def test_a_listener_hears_of_decompositions_and_merges(case):
    kind, layer, keys, steps = case
    model = convert(nn.Sequential(nn.Linear(12, 8)), layer, ["0"], rank=2)
    optimizer, found = kind(optim.param_groups(model), lr=0.01, **keys), set()
    for step in range(6):
        model(torch.randn(4, 12, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.phase_listener = phases = Phases()
        optimizer.step()
        found |= {step} if FIND in {name for name, _ in phases.heard} else set()
    assert found == steps


def test_a_prefixed_state_asks_for_its_own_keys_alone():
    class Unsearched(dict):
        def __iter__(self):
            raise AssertionError("291 members would search all keys of all")

        keys = items = __iter__

    held = Unsearched({"3.step": torch.zeros(()), "13.step": torch.zeros(()), "3.exp_avg": torch.ones(2)})
    state = PrefixedState(held, 3, ("step", "exp_avg", "exp_avg_sq"))
    assert list(state) == ["step", "exp_avg"]
    assert "step" in state
    assert "step" not in PrefixedState(held, 4, ("step",))
    assert len(state) == 2
    state["exp_avg_sq"] = torch.ones(2)
    assert "3.exp_avg_sq" in held


def test_clocks():
    assert [step for step in range(9) if every(4, step)] == [0, 4, 8]
    assert [since(step, 3) for step in range(1, 8)] == [1, 2, 3, 1, 2, 3, 1]
