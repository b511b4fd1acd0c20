"""Gradients freed in backward under FSDP2: the bits of an ordinary step, and what is refused."""

import pytest
from catalogue import OVER_PROCESSES, VARIANTS

ALWAYS = ("GaLoreAdamW", "RigLAdamW", "FiraAdamW", "HyperSparseAdamW")
WHOLE = [name for name in OVER_PROCESSES if not VARIANTS[name].layer]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_some_classes_move_as_by_an_ordinary_step(ranks, pool):
    told = pool.call(ranks, "released_parts:compare", [{"optimizer": name} for name in ALWAYS], timeout=200)
    assert len(told) == len(ALWAYS)
    assert not any(told.values()), told


@pytest.mark.thorough
@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("name", WHOLE)
def test_each_class_moves_as_by_an_ordinary_step(name, experts, pool):
    told = pool.call(2, "released_parts:compare", [{"optimizer": name, "experts": experts}], timeout=200)
    assert not any(told.values()), told


def test_what_is_refused(pool):
    of_ddp, of_whole, clipped, again = pool.call(2, "released_parts:refusals", timeout=200)
    assert "DistributedDataParallel sums whole gradients" in of_ddp
    assert "call release_gradients after fully_shard" in of_whole
    assert "freed in the backward pass" in clipped
    assert "one pass a step" in again or "several passes a step" in again
