"""Weights in 8 bits over processes. ``int8_parts.py`` runs in them."""

import pytest

pytestmark = pytest.mark.thorough


def test_fsdp2_and_ddp_are_one_process_to_the_bit(pool):
    """All processes see the same examples, so that averages of their gradients are those of one."""
    one, two = pool.call(1, "int8_parts:measure"), pool.call(2, "int8_parts:measure")
    assert two.pop("kept")
    assert one.pop("kept")
    for name, (losses, state) in one.items():
        assert two[name][0] == losses, name
        assert two[name][1] == state, name


def test_other_weights_on_another_process_are_refused(pool):
    first, second = pool.call(2, "int8_parts:apart")
    assert first == ""
    assert second.startswith("ordinary weights were copied onto other ones in 8 bits, in a run of several processes")
