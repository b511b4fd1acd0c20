"""A matrix stays due for a subspace until it has seen a gradient."""

import copy

import pytest
import torch
from torch import nn

from gracile import optim
from gracile.optim import GaLoreAdamW, full_state, load_full_state
from gracile.optim.low_rank.cosine import cosine_basis
from gracile.optim.low_rank.optimizer import LowRankOptimizer

RANK, GAP, ZEROS = 4, 50, 3
CASES = {
    "GaLoreAdamW": (optim.GaLoreAdamW, {}),
    "GaLoreAdamW svd": (optim.GaLoreAdamW, {"subspace_method": "svd"}),
    "GaLoreAdamW left": (optim.GaLoreAdamW, {"proj_type": "left"}),
    "GaLoreLion": (optim.GaLoreLion, {}),
    "GaLoreAdafactor": (optim.GaLoreAdafactor, {}),
    "GaLoreAdamW8bit": (optim.GaLoreAdamW8bit, {}),
    "Q-GaLore": (optim.GaLoreAdamW8bit, {"quant": True, "quant_n_bit": 8, "cos_threshold": 0.4}),
    "FiraAdamW": (optim.FiraAdamW, {}),
    "GaLorePlusAdamW": (optim.GaLorePlusAdamW, {}),
    "GradNormLoRPAdamW": (optim.GradNormLoRPAdamW, {}),
    "APOLLOAdamW svd": (optim.APOLLOAdamW, {"proj": "svd"}),
}
by_case = pytest.mark.parametrize(("cls", "keys"), CASES.values(), ids=CASES)


def matrix(shape=(40, 24)):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def made(cls, keys, W):
    return cls([{"params": [W], "rank": RANK, "update_proj_gap": GAP, **keys}])


def gradient(t, shape=(40, 24)):
    """Nearly of rank 4, in directions that stay."""
    staying, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + t)
    U, V = (torch.randn(side, 4, generator=staying) for side in shape)
    return U @ V.t() + 0.1 * torch.randn(shape, generator=noise)


def advance(optimizer, W, first, last, zeros=ZEROS):
    for t in range(first, last):
        W.grad = torch.zeros_like(W) if t < zeros else gradient(t)
        optimizer.step()


def energy(optimizer, W, G):
    """The share of a gradient's norm that the subspace holds."""
    group, state = optimizer.param_groups[0], optimizer.state[W]
    shard = optimizer._full_shard(W, group, 0, None)
    P = optimizer.columns(shard, group, state).float()
    held = (G @ P) if shard.side.right else (P.t() @ G)
    return (held.norm() / G.norm()).item()


@by_case
def test_the_first_gradient_gives_the_subspace(cls, keys):
    """And one refresh is enough: afterwards the clock is the usual one."""
    W = matrix()
    optimizer = made(cls, keys, W)
    advance(optimizer, W, 0, ZEROS)
    assert energy(optimizer, W, gradient(ZEROS)) < 0.7
    advance(optimizer, W, ZEROS, ZEROS + 1)
    assert energy(optimizer, W, gradient(ZEROS)) > 0.95
    held = {key: value.clone() for key, value in optimizer.state[W].items() if key.startswith("basis")}
    advance(optimizer, W, ZEROS + 1, GAP - 1)
    assert all(torch.equal(value, optimizer.state[W][key]) for key, value in held.items())


@by_case
@pytest.mark.parametrize("at", [1, ZEROS, ZEROS + 1, ZEROS + 2])
@pytest.mark.parametrize("how", ["state_dict", "full_state", "copy"])
def test_so_it_is_after_a_checkpoint(cls, keys, at, how):
    """To the bit the run that was not interrupted."""
    W = matrix()
    optimizer = made(cls, keys, W)
    advance(optimizer, W, 0, at)
    V = nn.Parameter(W.detach().clone())
    other = made(cls, keys, V)
    if how == "copy":
        other, V = copy.deepcopy((optimizer, W))
    elif how == "state_dict":
        other.load_state_dict(optimizer.state_dict())
    else:
        load_full_state(other, full_state(optimizer))
    for one, p in ((optimizer, W), (other, V)):
        advance(one, p, at, ZEROS + 4)
    if "8bit" in cls.__name__ and how == "full_state":
        torch.testing.assert_close(V, W, rtol=0, atol=1e-4)  # what is in 8 bits is rounded once more
    else:
        assert torch.equal(W, V)


@pytest.mark.parametrize("method", ["iterate", "svd"])
def test_what_is_found_from_zeros_is_no_overlap(method):
    """The exact vectors of zeros never change: by their overlap the gap would widen before there is a gradient."""
    W = matrix()
    keys = {"update_proj_gap": 2, "cos_threshold": 0.4, "subspace_method": method}
    optimizer = made(optim.GaLoreAdamW8bit, keys, W)
    advance(optimizer, W, 0, 21, zeros=20)
    state = optimizer.state[W]
    assert state["refresh_gap"] == 2
    assert state["overlaps"].isnan().all()
    advance(optimizer, W, 21, 25, zeros=20)
    assert state["overlaps"].isfinite().sum() == 2


def test_a_first_gradient_that_is_not_finite_does_not_count():
    W = matrix()
    optimizer = made(GaLoreAdamW, {}, W)
    W.grad = torch.full_like(W, torch.nan)
    with pytest.warns(UserWarning, match="not finite at a refresh"):
        optimizer.step()
    optimizer.state[W]["exp_avg"].zero_()
    optimizer.state[W]["exp_avg_sq"].zero_()
    advance(optimizer, W, 1, 2, zeros=0)
    assert energy(optimizer, W, gradient(1)) > 0.95


def test_a_gradient_that_comes_first_is_read_from_the_device_once_for_all_matrices(monkeypatch):
    """And no more when each has had one."""
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    held = [matrix() for _ in range(5)]
    optimizer = GaLoreAdamW([{"params": held, "rank": RANK, "update_proj_gap": 2}])
    for t in range(5):
        for i, p in enumerate(held):
            p.grad = torch.zeros_like(p) if t < i else gradient(t)
        optimizer.step()
    assert reads == [(5,), (4,), (3,), (2,), (1,)]
    for t in range(5, 9):
        for p in held:
            p.grad = gradient(t)
        optimizer.step()
    assert len(reads) == 5


def test_which_classes_wait():
    """Those whose subspace comes from the gradient of one step."""
    kinds = {kind for name in optim.__all__ if isinstance(kind := getattr(optim, name), type)}
    ranked = {kind for kind in kinds if issubclass(kind, LowRankOptimizer)}
    assert ranked == {cls for cls, _ in CASES.values()} | {optim.DCTAdamW, optim.LDAdamW}


@pytest.mark.parametrize("feedback", [None, "fp32", "8bit"])
@pytest.mark.parametrize("at", [1, ZEROS, ZEROS + 1])
def test_columns_of_a_cosine_basis_come_from_the_first_gradient(feedback, at):
    """And stay for the gap, also where the run goes on from a checkpoint."""
    W = matrix()
    optimizer = made(optim.DCTAdamW, {"error_feedback": feedback}, W)
    chosen = torch.tensor([17, 3, 11, 20])
    columns = cosine_basis(24, torch.device("cpu"))[:, chosen]
    G = torch.randn(40, 4, generator=torch.Generator().manual_seed(2)) @ columns.t()
    for t in range(ZEROS + 3):
        if t == at:
            W, before = nn.Parameter(W.detach().clone()), optimizer
            optimizer = made(optim.DCTAdamW, {"error_feedback": feedback}, W)
            optimizer.load_state_dict(before.state_dict())
        if t > ZEROS:
            assert set(optimizer.state[W]["indices"].tolist()) == set(chosen.tolist())
            G = torch.randn(40, 24)
        W.grad = torch.zeros_like(W) if t < ZEROS else G
        optimizer.step()
    assert set(optimizer.state[W]["indices"].tolist()) == set(chosen.tolist())
