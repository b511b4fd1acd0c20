"""Replicas choose the same masks. ``masked_replicas.py`` runs in the processes."""

import pytest


@pytest.mark.thorough
def test_replicas_that_begin_with_other_weights_have_the_masks_of_process_0(pool):
    """The engine gives all of them its weights only after the optimizer was built."""
    for name, told in pool.call(2, "masked_replicas:measure").items():
        assert told["same"], name
        assert sum(told["counts"]) == round(0.3 * 420), name
