"""Clipping in two backward passes under DistributedDataParallel and FSDP2."""

import pytest

SOME = ("GaLoreAdamW", "RigLAdamW", "FiraAdamW")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_steps_are_those_of_ordinary_clipping(ranks, pool):
    """A step whose norm is not finite is skipped on all processes."""
    tasks = [(name, layout) for layout in ("ddp", "fsdp2") for name in SOME]
    told = pool.call(ranks, "clipped_parts:compare", tasks, timeout=200)
    assert len(told) == len(tasks)
    for task, (weights, norms) in told.items():
        assert weights <= 1e-5, task
        assert norms <= 1e-5, task


def test_passes_that_fail_leave_replicas_that_agree(pool):
    assert pool.call(2, "clipped_parts:failures", timeout=200) <= 1e-6
