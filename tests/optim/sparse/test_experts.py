"""The experts of a layer in one tensor (E x m x n) are E matrices: what each of E parameters becomes, to the bit."""

import itertools
import math

import pytest
import torch
from torch import nn

from gracile.optim import (
    BlockSparseAdamW,
    CastAdamS,
    HyperSparseAdamW,
    RigLAdamW,
    SETAdamW,
    SparseAdamW,
    SRigLAdamW,
    SRSTEAdamW,
    WGSEFAdamW,
)
from gracile.optim.distributed import FlatShard, FullShard, ShardRange, UnsupportedLayout, Workspace
from gracile.optim.distributed.process_group import FakeGroup
from gracile.optim.sparse import alike_masks, masks
from gracile.optim.sparse.experts import experts_of, matrices_in

ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CLOCK = {"update_every": 3, "drop_fraction": 0.4, "t_end": 14}
SHAPES = [(3, 24, 16), (16, 32), (2, 16, 24), (1, 8, 16)]
STEPS = 11
MASKED = {
    "SET": (SETAdamW, {}),
    "SET by shape": (SETAdamW, {"distribution": "er", "rescale_init": True, "reinit_when_same": True}),
    "RigL": (RigLAdamW, {"grown_step": "own", "grown_warmup": 3}),
    "RigL by magnitude": (RigLAdamW, {"init": "magnitude", "distribution": "uniform"}),
    "SRigL": (SRigLAdamW, {"gamma_sal": 0.9}),
    "SRigL of all rows": (SRigLAdamW, {"gamma_sal": 0, "distribution": "uniform"}),
    "BLaST": (BlockSparseAdamW, {"block_size": 4}),
    "lamp": (SparseAdamW, {"distribution": "lamp"}),
    "global": (SparseAdamW, {"distribution": "global", "grow": "random"}),
    "frozen": (SparseAdamW, {"outside": "frozen", "init": "smallest", "decay_to": "start"}),
    "momentum": (SparseAdamW, {"grow": "momentum", "initial_sparsity": 0.2}),
    "random rows": (SparseAdamW, {"drop": "random", "grow": "random", "structure": "constant_fan_in"}),
    "random blocks": (SparseAdamW, {"drop": "random", "grow": "random", "structure": "block", "block_size": 8}),
    "MEST": (SparseAdamW, {"drop": "gradient_magnitude", "drop_lambda": 0.5, "distribution": "erk"}),
}
DENSE = {
    "SR-STE": (SRSTEAdamW, {"sr_lambda": 0.1}, {"n": 2, "m": 4}),
    "SR-STE decoupled": (SRSTEAdamW, {"sr_lambda": 0.1, "decoupled": True}, {"n": 1, "m": 8}),
    "CAST": (CastAdamS, {"lam": 0.1, "mask_every": 2, "total_steps": 9}, {"n": 2, "m": 4}),
    "HyperSparse": (
        HyperSparseAdamW, {"hs_lambda": 0.01, "interval": 2, "quantile_every": 3, "prune_at": 8}, {"sparsity": 0.7}
    ),
    **{
        f"WGSEF of {groups}": (
            WGSEFAdamW,
            {"groups": groups, "block_size": 5, "wgsef_lambda": 0.05, "ramp_steps": 3, "finish_at": 8},
            {"keep": 0.3},
        )
        for groups in ("rows", "columns", "blocks")
    },
}  # fmt: skip


def weights(dtype):
    generator = torch.Generator().manual_seed(0)
    return [(0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in SHAPES]


def apart(tensors):
    """Each matrix by itself."""
    return [own for tensor in tensors for own in (tensor if tensor.dim() == 3 else [tensor])]


def trained(make, tensors, split):
    held = [nn.Parameter(own.clone()) for own in (apart(tensors) if split else tensors)]
    optimizer = make(held)
    for t in range(STEPS):
        generator = torch.Generator().manual_seed(100 + t)
        gradients = [torch.randn(s, generator=generator, dtype=torch.float64).to(tensors[0].dtype) for s in SHAPES]
        for p, G in zip(held, apart(gradients) if split else gradients, strict=True):
            p.grad = G.clone()
        optimizer.step()
    return held, optimizer


def parts_of(p, state):
    """The weights and the mask of each matrix of a parameter, and its packed state by place."""
    at = state["indices"].long() if "indices" in state else torch.arange(p.numel())
    told = {"weights": p.detach()}
    for key, value in state.items():
        if value.dim() and key not in ("indices", "mask_bits"):
            flat = value.reshape(-1)
            dense = flat if len(flat) == p.numel() else flat.new_zeros(p.numel()).index_copy_(0, at, flat)
            told[key] = dense.view(p.shape)
    told["mask"] = torch.zeros(p.numel(), dtype=torch.bool).index_fill_(0, at, True).view(p.shape)
    return told


def joined(held, optimizer):
    """E parameters and what is held of them, as one tensor each."""
    own = iter([parts_of(p, optimizer.state[p]) for p in held])
    told = []
    for shape in SHAPES:
        each = [next(own) for _ in range(matrices_in(shape))]
        told.append({key: torch.stack([one[key] for one in each]).view(shape) for key in each[0]})
    return told


@pytest.fixture
def named(monkeypatch):
    """Parameters of one matrix that are called, where numbers are drawn for them, as the experts of one."""
    plain = masks.Masked.name
    table = [(i, "expert", e) if len(s) == 3 else (i,) for i, s in enumerate(SHAPES) for e in range(matrices_in(s))]

    def by_table():
        monkeypatch.setattr(masks.Masked, "name", property(lambda matrix: table[matrix.shard.position]))

    yield by_table
    monkeypatch.setattr(masks.Masked, "name", plain)


def assert_as_apart(make, dtype, named=lambda: None):
    tensors = weights(dtype)
    held, optimizer = trained(make, tensors, split=False)
    named()
    separate = joined(*trained(make, tensors, split=True))
    for p, theirs in zip(held, separate, strict=True):
        own = parts_of(p, optimizer.state[p])
        assert own.keys() == theirs.keys()
        for key, value in own.items():
            assert torch.equal(value, theirs[key]), key
    return held, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MASKED)
def test_masks_of_experts_are_those_of_parameters_of_their_own(name, dtype, named):
    cls, own = MASKED[name]
    held, optimizer = assert_as_apart(lambda params: cls(params, sparsity=0.7, **ADAM, **CLOCK, **own), dtype, named)
    assert len(optimizer.state[held[0]]["indices"]) < held[0].numel()


@pytest.mark.parametrize("name", DENSE)
def test_experts_of_methods_that_prune_at_the_end_are_parameters_of_their_own(name):
    cls, own, keys = DENSE[name]
    held, _ = assert_as_apart(lambda params: cls([{"params": params, **keys}], **ADAM, **own), torch.float32)
    assert "SR-STE" in name or (held[0] == 0).float().mean() > 0.4


def moved(cls, own, keys, tensors, transposed):
    """Weights after some steps, of experts stored as E x in x out, or as what they are."""
    held = [nn.Parameter((W.mT if transposed else W).clone(memory_format=torch.contiguous_format)) for W in tensors]
    optimizer = cls([{"params": held, **keys}], transposed_experts=transposed, **ADAM, **own)
    for t in range(STEPS):
        generator = torch.Generator().manual_seed(100 + t)
        for p, W in zip(held, tensors, strict=True):
            G = torch.randn(W.shape, generator=generator)
            p.grad = (G.mT if transposed else G).contiguous()
        optimizer.step()
    return [(p.mT if transposed else p).detach() for p in held]


@pytest.mark.parametrize("gpu", [False, True], ids=["", "as on a GPU"])
@pytest.mark.parametrize("name", ["SRigL", "rows of momentum", "random rows", "SR-STE", "CAST"])
def test_experts_that_are_stored_transposed_are_what_they_are(name, gpu, monkeypatch):
    if gpu:
        monkeypatch.setattr(alike_masks, "launches_cost", lambda device: True)
    rows = {"grow": "momentum", "structure": "constant_fan_in", "rescale_init": True}
    cls, own, keys = DENSE[name] if name in DENSE else (*{**MASKED, "rows of momentum": (SparseAdamW, rows)}[name], {})
    own = own if keys else {"sparsity": 0.7, **CLOCK, **own}
    generator = torch.Generator().manual_seed(3)
    tensors = [0.3 * torch.randn(shape, generator=generator) for shape in [(3, 24, 16), (2, 8, 32)]]
    straight, other = (moved(cls, own, keys, tensors, transposed) for transposed in (False, True))
    assert all(torch.equal(one, two) for one, two in zip(straight, other, strict=True))


ROWS = {"sparsity": 0.5, "t_end": 9, "transposed_experts": True}


@pytest.mark.parametrize(
    ("cls", "shape", "keys", "words"),
    [
        (SRigLAdamW, (8, 8), ROWS, "is for experts"),
        (SRSTEAdamW, (8, 8), {"transposed_experts": True}, "is for experts"),
        (SRSTEAdamW, (3, 8, 15), {"n": 2, "m": 5, "transposed_experts": True}, "rows that m=5 divides"),
        (SparseAdamW, (3, 8, 12), ROWS, "is for structure='constant_fan_in'"),
        (SRigLAdamW, (3, 8, 12), ROWS | {"transposed_experts": 1}, "must be True or False"),
        (RigLAdamW, (3, 8, 12), ROWS, "unknown parameter group key 'transposed_experts'"),
    ],
)
def test_a_transposition_that_means_nothing_is_refused(cls, shape, keys, words):
    with pytest.raises(ValueError, match=words):
        cls([{"params": [nn.Parameter(torch.randn(shape))], **keys}])


def test_cut_experts_that_are_stored_transposed_are_refused():
    held = ShardRange((4, 3, 4), (0, 13, 48), 0, FakeGroup(0, 2))
    shard = FlatShard(torch.zeros(13), torch.zeros(13), held, 0, Workspace())
    with pytest.raises(UnsupportedLayout, match="needs whole experts"):
        list(experts_of(shard, transposed=True))


@pytest.mark.parametrize("name", ["RigL by magnitude", "SRigL of all rows"])
def test_every_expert_keeps_as_many(name):
    cls, own = MASKED[name]
    held, _ = trained(lambda params: cls(params, sparsity=0.75, **ADAM, **CLOCK, **own), weights(torch.float32), False)
    for p in held:
        assert {int(own.count_nonzero()) for own in apart([p])} == {math.prod(p.shape[-2:]) // 4}


def test_experts_are_drawn_apart():
    p = nn.Parameter(torch.ones(4, 16, 16))
    SETAdamW([p], sparsity=0.5, t_end=9, distribution="uniform")
    assert all((one != other).any() for one, other in itertools.combinations(p.detach() != 0, 2))


def test_experts_that_an_engine_has_flattened_are_refused():
    p = nn.Parameter(torch.randn(3, 8, 4))
    optimizer = RigLAdamW([p], sparsity=0.5, t_end=9)
    p.data = torch.randn(96)
    p.grad = torch.ones(96)
    with pytest.raises(UnsupportedLayout, match=r"experts came as a tensor of shape \(96,\), without matrices"):
        optimizer.step()


def test_a_convolution_is_one_matrix():
    one, other = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Parameter(torch.empty(8, 36))
    other.data.copy_(one.data.view(8, 36))
    for p in (one, other):
        SRigLAdamW([p], sparsity=0.5, t_end=9, distribution="uniform")
    assert torch.equal(one.view(8, 36), other)


@pytest.mark.parametrize("name", ["SRigL", "momentum", "BLaST", "lamp"])
def test_a_run_of_experts_that_is_resumed_keeps_every_bit(name):
    cls, own = MASKED[name]

    def make(params):
        return cls(params, sparsity=0.7, **ADAM, **CLOCK, **own)

    held, optimizer = trained(make, weights(torch.float32), split=False)
    twins = [nn.Parameter(torch.randn_like(p)) for p in held]
    resumed = make(twins)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(held, twins, strict=True):
        q.data.copy_(p)
    for t in range(4):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(held, twins, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        resumed.step()
    for p, q in zip(held, twins, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, resumed.state[q][key]) for key, value in optimizer.state[p].items())


@pytest.mark.parametrize("bounds", [(0, 0, 5, 12, 23, 23, 40, 48), (0, 24, 48), (0, 13, 48), (0, 12, 36, 48)])
def test_each_expert_is_held_whole_by_one_process_or_cut_on_all(bounds):
    """Four experts of 12 weights each, cut anywhere."""
    count, seen = len(bounds) - 1, []
    for index in range(count):
        held = ShardRange((4, 3, 4), bounds, 0, FakeGroup(index, count))
        own = torch.arange(bounds[index], bounds[index + 1])
        seen.append(list(experts_of(FlatShard(own, own, held, 0, Workspace()))))
    cut = [[e.number for e in experts if e.shard.split] for experts in seen]
    assert all(numbers == cut[0] for numbers in cut)
    whole = [e.number for experts in seen for e in experts if not e.shard.split]
    assert sorted(whole + cut[0]) == [0, 1, 2, 3]
    everywhere = {number: [] for number in range(4)}
    for experts in seen:
        assert [e.begin for e in experts if e.end > e.begin] == sorted(e.begin for e in experts if e.end > e.begin)
        for e in experts:
            assert e.end - e.begin == e.shard.parameter.numel()
            everywhere[e.number] += e.shard.parameter.reshape(-1).tolist()
    assert everywhere == {number: list(range(12 * number, 12 * number + 12)) for number in range(4)}


def test_experts_of_one_process_are_views():
    p = torch.arange(24.0).view(2, 3, 4)
    for e in experts_of(FullShard(p, 0, Workspace())):
        e.shard.parameter.neg_()
    assert torch.equal(p, -torch.arange(24.0).view(2, 3, 4))
