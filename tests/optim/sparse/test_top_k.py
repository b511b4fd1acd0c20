"""The k largest, exactly: against a sort of (value, index), in every dtype, in parts, and drawn by random keys."""

import math

import pytest
import torch

from gracile.optim.distributed import FullShard
from gracile.optim.sparse import top_k as selection
from gracile.optim.sparse.top_k import Choice, keys_of, largest_of_all, largest_of_each, random_keys

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}

by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture(autouse=True, params=["by digits", "by sorting"])
def way(request, monkeypatch):
    """As on a CPU, and as on a GPU."""
    monkeypatch.setattr(selection, "launches_cost", lambda device: request.param == "by sorting")


def values(size, seed=0, dtype=torch.float32):
    """Of many sizes, with many ties of either sign, and the ends of the range."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(size, generator=generator, dtype=torch.float64)
    found *= 10.0 ** torch.randint(-6, 6, (size,), generator=generator)
    found[::3] = found[::3].sign() * torch.randint(0, 4, (len(found[::3]),), generator=generator)
    ends = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, math.inf, -math.inf, 1e-38])
    found[: len(ends)] = ends[:size].double()
    return found[torch.randperm(size, generator=generator)].to(dtype)


def choice(held, out=()):
    """Of absolute values; those at ``out`` may not be chosen."""

    def keys(begin, end):
        found = keys_of(held[begin:end])
        for i in out:
            if begin <= i < end:
                found[i - begin] = -1
        return found

    return Choice(FullShard(held, 0, None), len(held), keys)


def sorted_best(held, count, out=()):
    order = sorted((i for i in range(len(held)) if i not in out), key=lambda i: (-abs(held[i].item()), i))
    return sorted(order[:count])


# ---- one choice -----------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("count", [0, 1, 2, 17, 63, 99, 100, 105])
def test_they_are_the_largest_and_of_equal_ones_the_first(dtype, count):
    held = values(100, seed=count, dtype=dtype)
    (chosen,) = largest_of_each([choice(held)], [count])
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted_best(held, count)


@by_dtype
def test_of_equal_values_exactly_as_many_as_asked_for_come(dtype):
    held = torch.full((50,), -0.25, dtype=dtype)
    for count in range(0, 51, 7):
        assert largest_of_each([choice(held)], [count])[0].tolist() == list(range(count))


def test_the_last_bit_decides():
    for dtype, whole in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        one = torch.ones(1, dtype=dtype).view(whole)
        held = torch.cat([one + i for i in (3, 1, 4, 0, 2)]).view(dtype)
        for count, expected in enumerate([[], [2], [0, 2], [0, 2, 4], [0, 1, 2, 4]]):
            assert largest_of_each([choice(held)], [count])[0].tolist() == expected


@by_dtype
def test_what_is_out_is_not_chosen_though_too_few_are_left(dtype):
    held, out = values(30, dtype=dtype), {0, 3, 4, 5, 11, 28, 29}
    for count in (0, 5, 23, 24, 30):
        assert largest_of_each([choice(held, out)], [count])[0].tolist() == sorted_best(held, count, out)
    assert largest_of_each([choice(held, set(range(30)))], [4])[0].tolist() == []


def test_of_nothing_nothing_is_chosen():
    assert largest_of_each([], []) == []
    assert largest_of_all([], 3) == []
    assert largest_of_each([choice(torch.zeros(0))], [2])[0].tolist() == []


# ---- several --------------------------------------------------------------------------------------------------------


@by_dtype
def test_each_of_several_has_its_own_count(dtype):
    many = [values(size, seed=size, dtype=dtype) for size in (40, 9, 200, 1)]
    counts = [13, 9, 0, 1]
    found = largest_of_each([choice(held) for held in many], counts)
    assert [own.tolist() for own in found] == [sorted_best(h, k) for h, k in zip(many, counts, strict=True)]


@by_dtype
@pytest.mark.parametrize("count", [0, 1, 40, 90, 249, 250, 300])
def test_one_count_over_all_is_a_sort_of_all_of_them(dtype, count):
    """Of equal values first those of the first choice."""
    many = [values(size, seed=size, dtype=dtype) for size in (40, 9, 200, 1)]
    pairs = [(number, i) for number, held in enumerate(many) for i in range(len(held))]
    order = sorted(pairs, key=lambda pair: (-abs(many[pair[0]][pair[1]].item()), pair))[:count]
    found = largest_of_all([choice(held) for held in many], count)
    assert [(number, i) for number, own in enumerate(found) for i in own.tolist()] == sorted(order)


# ---- in parts -------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_keys_are_looked_at_in_parts_of_a_bounded_size(monkeypatch, dtype, at_once):
    held = values(150, dtype=dtype)
    whole = [largest_of_each([choice(held, {3, 70})], [count])[0].tolist() for count in (0, 31, 150)]
    for limit in ("AT_ONCE", "ON_A_GPU"):
        monkeypatch.setattr(selection, limit, at_once)
    plain, sizes = choice(held, {3, 70}), []

    def watched(begin, end):
        sizes.append(end - begin)
        return plain.keys(begin, end)

    parts = [largest_of_each([plain._replace(keys=watched)], [count])[0].tolist() for count in (0, 31, 150)]
    assert parts == whole
    assert max(sizes) == at_once
    assert sum(sizes) == 3 * 2 * 150, "all keys are looked at twice"


# ---- random keys ----------------------------------------------------------------------------------------------------


def test_random_keys_are_a_function_of_place_and_purpose_alone():
    places = torch.arange(5000)
    keys = random_keys(places, 3, "grow", 100)
    assert keys.dtype == torch.int32
    assert keys.min() >= 0
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    torch.rand(3)
    assert torch.equal(random_keys(places[order], 3, "grow", 100), keys[order])
    assert torch.equal(torch.cat([random_keys(part, 3, "grow", 100) for part in places.split(777)]), keys)
    assert torch.equal(random_keys(places, 3, "grow", 100), keys)
    for other in ((4, "grow", 100), (3, "drop", 100), (3, "grow", 200)):
        assert (random_keys(places, *other) == keys).float().mean() < 0.01


def test_random_keys_are_the_same_on_every_machine():
    """Written down: a run that goes on elsewhere draws what it would have drawn."""
    places = torch.tensor([0, 1, 2, 1000, 2**31, 2**40 + 7])
    assert random_keys(places, 0, "first").tolist() == [
        1385956946,
        74298400,
        930605996,
        357953930,
        1727680854,
        1355331358,
    ]
    assert (random_keys(torch.tensor([2**62, 2**63 - 1]), 0, "first") >= 0).all()


def test_random_keys_are_uniform():
    """32 buckets of 2^16 keys: chi squared has mean 31 and deviation 8; and every bit is set half of the time."""
    for seed in range(4):
        keys = random_keys(torch.arange(2**16), seed, "first")
        buckets = torch.bincount(keys.long() >> 26, minlength=32).double()
        assert ((buckets - 2048).square() / 2048).sum() < 31 + 5 * 8
        bits = (keys[:, None] >> torch.arange(31)) & 1
        assert (bits.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / 256


def test_every_place_and_every_pair_of_places_is_as_likely():
    """3000 draws of 6 out of 20: each place 0.3 of the time, each pair 6 5 / (20 19)."""
    seen = torch.zeros(20, 20, dtype=torch.float64)
    for seed in range(3000):
        keys = random_keys(torch.arange(20), seed, 0, "grow", 4)
        chosen = torch.zeros(20, dtype=torch.float64)
        chosen[keys.argsort(descending=True)[:6]] = 1
        seen += torch.outer(chosen, chosen)
    single, pair = seen.diag() / 3000, (seen - seen.diag().diag())[~torch.eye(20, dtype=torch.bool)] / 3000
    assert (single - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 3000)
    expected = 6 * 5 / (20 * 19)
    assert (pair - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / 3000)
