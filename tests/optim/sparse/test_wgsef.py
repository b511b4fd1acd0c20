"""WGSEF: groups of a matrix, the proximal map after a step, and exactly k groups in the end."""

import pytest
import torch
from torch import nn

from gracile.optim import WGSEFAdamW
from gracile.optim.distributed import FlatShard, FullShard, ShardRange
from gracile.optim.distributed.process_group import FakeGroup
from gracile.optim.distributed.workspace import Workspace
from gracile.optim.sparse.group_envelope import proximal_factors
from gracile.optim.sparse.wgsef import Tiles, largest

SHAPES = [(12, 5), (5, 12), (8, 8)]
by_shape = pytest.mark.parametrize("shape", SHAPES)
by_groups = pytest.mark.parametrize("groups", ["rows", "columns", "blocks"])
by_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)


def weight(shape, seed=0, dtype=torch.float64):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def advance(optimizer, held, first, last):
    for t in range(first, last):
        generator = torch.Generator().manual_seed(100 + t)
        for p in held:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def parts_of(W, groups, b=3):
    """The groups of a matrix as views, in order."""
    if groups == "rows":
        return list(W)
    if groups == "columns":
        return list(W.T)
    m, n = W.shape
    return [W[i : i + b, j : j + b] for i in range(0, m, b) for j in range(0, n, b)]


def tiles(shape, groups, b=3):
    return Tiles.of(FullShard(torch.empty(shape), 0, Workspace()), {"groups": groups, "block_size": b})


def alive(W, groups):
    return [bool(part.any()) for part in parts_of(W.detach(), groups)]


# ---- groups ---------------------------------------------------------------------------------------------------------


@by_shape
@by_groups
def test_sizes_and_norms_are_those_of_slices(shape, groups):
    W, own = weight(shape), tiles(shape, groups)
    parts = parts_of(W.detach(), groups)
    assert own.sizes(W.device).view(-1).tolist() == [part.numel() for part in parts]
    expected = torch.stack([part.square().sum() for part in parts])
    torch.testing.assert_close(own.squares(FullShard(W, 0, Workspace())).view(-1), expected)
    numbers = torch.arange(len(parts)).double()
    spread = own.each(numbers, FullShard(W, 0, Workspace()))
    for number, part in zip(numbers, parts_of(spread, groups), strict=True):
        assert (part == number).all()


@by_shape
@by_groups
def test_parts_of_a_matrix_add_up_to_it_and_get_what_is_theirs(shape, groups):
    """Cut at any two places, also within a row, also into nothing."""
    W, own = weight(shape).detach(), tiles(shape, groups)
    size = W.numel()
    whole = own.squares(FullShard(W, 0, Workspace()))
    values = torch.rand(own.grid[0] * own.grid[1], dtype=torch.float64)
    spread = own.each(values, FullShard(W, 0, Workspace())).reshape(-1)
    for first in range(0, size + 1, 7):
        for last in range(first, size + 1, 11):
            bounds, total, got = (0, first, last, size), torch.zeros_like(whole), []
            for rank in range(3):
                piece = ShardRange(shape, bounds, bounds[rank], FakeGroup(rank, 3))
                flat = piece.of(W.view(-1))
                shard = FlatShard(flat, flat, piece, 0, Workspace())
                total += own.squares(shard)
                got.append(own.each(values, shard))
            torch.testing.assert_close(total, whole, rtol=1e-13, atol=0)
            assert torch.equal(torch.cat(got), spread)


def test_the_largest_are_exactly_k_and_ties_go_to_the_lowest():
    norms = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 2.0])
    for k, expected in ((1, [1]), (2, [1, 5]), (4, [0, 1, 2, 5]), (6, [0, 1, 2, 3, 4, 5])):
        assert largest(norms, k).nonzero().view(-1).tolist() == expected


# ---- steps ----------------------------------------------------------------------------------------------------------


@by_shape
@by_groups
def test_a_step_is_adamw_and_then_the_proximal_map(shape, groups):
    W, X = weight(shape), weight(shape)
    keys = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1}
    optimizer = WGSEFAdamW([W], **keys, keep=0.5, groups=groups, block_size=3, wgsef_lambda=0.4, ramp_steps=4)
    plain = torch.optim.AdamW([X], **keys)
    for t in range(8):
        advance(optimizer, [W], t, t + 1)
        advance(plain, [X], t, t + 1)
        with torch.no_grad():
            parts = parts_of(X, groups)
            norms = torch.stack([part.norm() for part in parts]).float()
            sizes = torch.tensor([part.numel() for part in parts])
            lam = 0.05 * 0.4 * min(1, (t + 1) / 4)
            for part, factor in zip(parts, proximal_factors(norms, sizes, round(len(parts) / 2), lam), strict=True):
                part.mul_(factor.float())
        torch.testing.assert_close(W, X, rtol=1e-9, atol=1e-12)


@by_shape
@by_groups
@by_dtype
def test_in_the_end_exactly_k_groups_stay_and_keep_training(shape, groups, dtype):
    W = weight(shape, dtype=dtype)
    optimizer = WGSEFAdamW(
        [W], lr=0.05, keep=0.4, groups=groups, block_size=3, ramp_steps=2, finish_at=5, weight_decay=0.1
    )
    advance(optimizer, [W], 0, 5)
    left, after = alive(W, groups), W.detach().clone()
    assert sum(left) == max(1, round(0.4 * len(left)))
    advance(optimizer, [W], 5, 30)
    assert alive(W, groups) == left
    assert torch.equal(W == 0, after == 0), "no weight of a group that stays is lost"
    moved = [not torch.equal(a, b) for a, b in zip(parts_of(W, groups), parts_of(after, groups), strict=True)]
    assert moved == left


def test_those_that_stay_are_the_largest():
    W = weight((9, 6))
    optimizer = WGSEFAdamW([W], lr=0.0, keep=1 / 3, finish_at=1)
    order = W.detach().norm(dim=1).argsort(descending=True)[:3].sort().values
    advance(optimizer, [W], 0, 1)
    assert W.detach().any(1).nonzero().view(-1).tolist() == order.tolist()


def test_the_envelope_drives_groups_to_zero_before_the_last_choice():
    """Rows that the data does not need go, one after the other; without the envelope none does. Where the data is met
    exactly, gradients are rounding, which Adam makes as large as any: now and then a row is of that size for a step."""
    left, sizes = {}, {}
    for strength in (0.0, 0.3):
        torch.manual_seed(0)
        X = torch.randn(200, 10)
        truth = torch.randn(16, 10) * (torch.arange(16) % 4 == 0)[:, None]
        W = nn.Parameter(0.1 * torch.randn(16, 10))
        optimizer = WGSEFAdamW([W], lr=0.02, keep=0.25, wgsef_lambda=strength, ramp_steps=100)
        norms = []
        for _ in range(400):
            optimizer.zero_grad()
            (X @ W.T - X @ truth.T).square().mean().backward()
            optimizer.step()
            norms.append(W.detach().norm(dim=1))
        sizes[strength] = torch.stack(norms[100:])
        left[strength] = (sizes[strength] > 0).float().mean(0).gt(0.5).nonzero().view(-1).tolist()
    assert left == {0.0: list(range(16)), 0.3: [0, 4, 8, 12]}
    gone = torch.arange(16) % 4 > 0
    assert sizes[0.3][:, gone].max() < 1e-12
    assert sizes[0.3][:, ~gone].min() > 0.1


def test_permuted_rows_train_as_before():
    W, order = weight((9, 6)), torch.tensor([3, 1, 8, 0, 2, 7, 5, 6, 4])
    V = nn.Parameter(W.detach()[order].clone())
    keys = {"lr": 0.05, "keep": 0.5, "wgsef_lambda": 0.3, "ramp_steps": 0, "finish_at": 6}
    one, other = WGSEFAdamW([W], **keys), WGSEFAdamW([V], **keys)
    for t in range(9):
        G = torch.randn(9, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        W.grad, V.grad = G, G[order]
        one.step()
        other.step()
        torch.testing.assert_close(W.detach()[order], V.detach(), rtol=1e-9, atol=1e-12)


def test_without_a_keep_it_is_adamw():
    W, X = weight((9, 6)), weight((9, 6))
    advance(WGSEFAdamW([W], lr=0.01), [W], 0, 5)
    advance(torch.optim.AdamW([X], lr=0.01, weight_decay=0.0), [X], 0, 5)
    torch.testing.assert_close(W, X, rtol=1e-12, atol=1e-14)


def test_a_large_matrix_of_zeros_and_one_of_huge_numbers_stay_finite():
    for scale in (0.0, 1e18):
        W = nn.Parameter(scale * torch.ones(6, 4))
        advance(WGSEFAdamW([W], keep=0.5, ramp_steps=0), [W], 0, 3)
        assert torch.isfinite(W).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep": 0}, r"keep must be a number in \(0, 1\] or None, got 0"),
        ({"groups": "heads"}, "groups must be one of rows, columns, blocks, got 'heads'"),
        ({"block_size": 0}, "block_size must be a whole number >= 1, got 0"),
        ({"ramp_steps": -1}, "ramp_steps must be a whole number >= 0, got -1"),
        ({"wgsef_lambda": -0.1}, "wgsef_lambda must be a number >= 0, got -0.1"),
        ({"finish_at": 0}, "finish_at must be a whole number >= 1 or None, got 0"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        WGSEFAdamW([weight((3, 3))], **keys)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"keep=0.5 needs matrices, got a parameter of shape \(7,\)"):
        WGSEFAdamW([weight((7,))], keep=0.5)
