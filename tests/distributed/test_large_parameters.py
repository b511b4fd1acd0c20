"""Parts of a large parameter that move in pieces. ``large_parameters.py`` runs in processes."""

import pytest


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_parts_in_pieces_have_the_bits_of_parts(pool, processes):
    """Also where a block of 8-bit codes lies on two processes, and where a process has none of a piece."""
    told = pool.call(processes, "large_parameters:measure")
    assert len(told) == 3
    for name, (apart, writes) in told.items():
        assert apart == 0, name
        assert writes > 3 * 4, "a step in pieces"
    assert told["8 bits"][1] == 3 * (-(-9090 // 512) + -(-4900 // 512) + 1), "as many on every process"
