"""Sparsity over matrices: sums to the unit, closed forms, and lamp and global against a loop over every weight."""

import math

import pytest
import torch

from gracile.optim.sparse.layer_budgets import (
    BY_SHAPE,
    budgets,
    budgets_by_weight,
    lamp_scores,
    whole_numbers,
)

LADDERS = {
    "one": [(12, 20)],
    "square": [(16, 16)] * 4,
    "mixed": [(64, 48), (48, 64), (16, 48), (200, 48), (7, 5)],
    "tiny": [(3, 2), (2, 2), (100, 90), (1, 4)],
    "convolutions": [(8, 3, 3, 3), (16, 8, 1, 1), (16, 16, 3, 3), (10, 16)],
}
DENSITIES = [0.0, 0.01, 0.1, 1 / 3, 0.5, 0.77, 0.99, 1.0]

by_ladder = pytest.mark.parametrize("shapes", LADDERS.values(), ids=LADDERS.keys())


def odds(shape, kind):
    sizes = shape if kind == "erk" else shape[:2]
    return sum(sizes) / math.prod(sizes) if kind != "uniform" else 1.0


def water_level(shapes, density, kind):
    """Densities min(1, eps p_l) that keep the share; eps by bisection."""
    units = [math.prod(shape) for shape in shapes]
    low, high = 0.0, 1e9
    for _ in range(200):
        eps = (low + high) / 2
        held = sum(min(1.0, eps * odds(s, kind)) * n for s, n in zip(shapes, units, strict=True))
        low, high = (eps, high) if held < density * sum(units) else (low, eps)
    return [min(1.0, low * odds(shape, kind)) for shape in shapes]


# ---- by shape -------------------------------------------------------------------------------------------------------


@by_ladder
@pytest.mark.parametrize("kind", BY_SHAPE)
def test_sums_are_exact_and_no_matrix_is_more_than_full(shapes, kind):
    units = [math.prod(shape) for shape in shapes]
    for density in DENSITIES:
        counts = budgets(units, shapes, density, kind)
        assert sum(counts) == round(density * sum(units))
        assert all(isinstance(k, int) and 0 <= k <= n for k, n in zip(counts, units, strict=True))


@by_ladder
@pytest.mark.parametrize("kind", BY_SHAPE)
def test_each_is_within_a_unit_of_its_share(shapes, kind):
    """The densities of matrices that are not full have the ratios of p."""
    units = [math.prod(shape) for shape in shapes]
    for density in DENSITIES[1:-1]:
        counts = budgets(units, shapes, density, kind)
        total = round(density * sum(units)) / sum(units)
        for count, share, n in zip(counts, water_level(shapes, total, kind), units, strict=True):
            assert abs(count - share * n) < 1 + 1e-6


def test_square_matrices_of_one_size_are_all_alike():
    for kind in BY_SHAPE:
        assert budgets([256] * 4, [(16, 16)] * 4, 0.25, kind) == [64] * 4


def test_er_counts_two_dimensions_and_erk_all():
    shapes = [(8, 4, 3, 3), (16, 8, 3, 3)]
    units = [288, 1152]
    ratio = {}
    for kind in ("er", "erk"):
        counts = budgets(units, shapes, 0.1, kind)
        ratio[kind] = counts[0] / units[0] / (counts[1] / units[1])
    assert ratio["er"] == pytest.approx((12 / 32) / (24 / 128), rel=0.02)
    assert ratio["erk"] == pytest.approx((18 / 288) / (30 / 1152), rel=0.02)


def test_matrices_that_would_be_more_than_full_become_full_together():
    shapes = [(3, 2), (2, 3), (60, 50)]
    assert budgets([6, 6, 3000], shapes, 0.1, "erk") == [6, 6, 301 - 12]


def test_what_is_left_goes_to_the_largest_fractions():
    assert whole_numbers([1.25, 2.5, 0.25], [9, 9, 9], 4) == [1, 3, 0]
    assert whole_numbers([1.5, 1.5, 1.0], [9, 9, 9], 4) == [2, 1, 1]
    assert whole_numbers([2.6, 1.4], [2, 9], 4) == [2, 2]
    assert whole_numbers([0.1 * 3, 0.7], [1, 1], 1) == [0, 1]
    assert whole_numbers([2.9999999999, 1.0000000001], [9, 9], 4) == [3, 1]


# ---- by weight ------------------------------------------------------------------------------------------------------


def weights(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(10.0**-i * torch.randn(shape, generator=generator)).to(dtype) for i, shape in enumerate(shapes)]


def scores_by_hand(weight):
    """A weight's square over the sum of those from the largest to it; of equal ones the first comes first."""
    squares, scores, total = [w.item() ** 2 for w in weight.double().flatten()], {}, 0.0
    for i in sorted(range(len(squares)), key=lambda i: (-squares[i], i)):
        total += squares[i]
        scores[i] = squares[i] / total if squares[i] else 0.0
    return [scores[i] for i in range(len(squares))]


def by_hand(held, density, kind):
    scores = [scores_by_hand(W) if kind == "lamp" else W.abs().flatten().tolist() for W in held]
    pairs = [(number, i) for number, own in enumerate(scores) for i in range(len(own))]
    order = sorted(pairs, key=lambda pair: (-scores[pair[0]][pair[1]], pair))[: round(density * len(pairs))]
    return [sum(number == own for own, _ in order) for number in range(len(held))]


def test_lamp_scores_of_one_two_three():
    expected = torch.tensor([1 / 14, 4 / 13, 1.0], dtype=torch.float64)
    torch.testing.assert_close(lamp_scores(torch.tensor([1.0, -2.0, 3.0])), expected)
    torch.testing.assert_close(lamp_scores(torch.tensor([3.0, 1.0, -2.0])), expected[[2, 0, 1]])


@pytest.mark.parametrize("kind", ["lamp", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_lamp_and_global_are_a_sort_of_every_score(kind, dtype):
    held = weights((12, 9), (9, 12), (10, 10), (1, 7), dtype=dtype)
    for density in (0.02, 0.1, 0.4, 0.9, 1.0):
        assert budgets_by_weight(held, density, kind) == by_hand(held, density, kind)


def test_lamp_does_not_see_the_scale_of_a_matrix_and_leaves_each_one_weight():
    held = weights((12, 9), (9, 12), (10, 10))
    counts = budgets_by_weight(held, 0.1, "lamp")
    assert budgets_by_weight([W * 2.0**k for W, k in zip(held, (-20, 3, 11), strict=True)], 0.1, "lamp") == counts
    assert budgets_by_weight(held, 0.1, "global")[2] < counts[2]
    assert budgets_by_weight(held, 3 / 316, "lamp") == [1, 1, 1]


@pytest.mark.parametrize("kind", ["lamp", "global"])
def test_zeros_and_ties_are_counted_exactly(kind):
    """A matrix of zeros has scores of zero, not NaN; what is missing is made up of zeros, of the first matrix first."""
    held = [torch.zeros(5, 4), torch.ones(4, 5), torch.zeros(10)]
    held[1][2:] = 0
    assert torch.equal(lamp_scores(held[0].flatten()), torch.zeros(20, dtype=torch.float64))
    assert budgets_by_weight(held, 0.2, kind) == [0, 10, 0]
    assert budgets_by_weight(held, 0.5, kind) == [15, 10, 0]
    assert budgets_by_weight(held, 1.0, kind) == [20, 20, 10]
    tied = [torch.ones(6), torch.ones(6)]
    assert sum(budgets_by_weight(tied, 0.5, kind)) == 6


def test_of_one_matrix_all_say_the_same():
    (W,) = weights((13, 11))
    for density in DENSITIES:
        counts = {tuple(budgets([143], [(13, 11)], density, kind)) for kind in BY_SHAPE}
        counts |= {tuple(budgets_by_weight([W], density, kind)) for kind in ("lamp", "global")}
        assert counts == {(round(density * 143),)}


def test_lamp_adds_squares_in_fp64():
    """In fp32 the sum would stand still: each of the squares of 1e-6 is lost behind one of 100."""
    W = torch.full((2**18,), 1e-3)
    W[7] = 10.0
    scores = lamp_scores(W)
    assert scores.min().item() == pytest.approx(1e-6 / (100 + 1e-6 * (2**18 - 1)), rel=1e-6)


@pytest.mark.parametrize("kind", BY_SHAPE)
def test_a_matrix_without_elements_has_none(kind):
    assert budgets([0, 40], [(0, 5), (8, 5)], 0.5, kind) == [0, 20]
