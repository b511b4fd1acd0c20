"""Clipping in two backward passes under DistributedDataParallel and FSDP2."""

import pytest

SOME = [("GaLoreAdamW", "ddp"), ("GaLoreAdamW", "fsdp2")]
MORE = [(name, layout) for name in ("GaLoreAdamW", "RigLAdamW", "FiraAdamW") for layout in ("ddp", "fsdp2")]


@pytest.mark.parametrize(
    ("ranks", "tasks"),
    [(2, SOME), *(pytest.param(ranks, MORE, marks=pytest.mark.thorough, id=f"all {ranks}") for ranks in (2, 4))],
)
def test_steps_are_those_of_ordinary_clipping(ranks, tasks, pool):
    """A step whose norm is not finite is skipped on all processes."""
    told = pool.call(ranks, "clipped_parts:compare", tasks, timeout=200)
    assert len(told) == len(tasks)
    for task, (weights, norms) in told.items():
        assert weights <= 1e-5, task
        assert norms <= 1e-5, task


def test_passes_that_fail_leave_replicas_that_agree(pool):
    """After the first of a step that did, the run is that of one without."""
    told = pool.call(2, "clipped_parts:failures", timeout=200)
    assert told[1] == 0.0
    assert told[2] > 0.0
