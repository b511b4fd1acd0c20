"""What gpu_check.py sees of graphs, on a CPU."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_check


@pytest.mark.thorough
def test_replays_are_told_beside_steps():
    told = gpu_check.replayed("GaLoreAdamW", "cpu")
    assert told == {"replays": 10, "of_movement": 0.0}
    assert gpu_check.as_graph(told) == "0.0e+00, 10 replays"


def test_what_is_not_captured_says_why():
    told = gpu_check.replayed("LDAdamW", "cpu")
    assert gpu_check.as_graph(told) == "its step asks the host, or changes what there is to replay"


@pytest.mark.thorough
def test_graphs_of_compiled_steps_are_counted():
    told = gpu_check.compiled("GaLoreAdamW", "cpu", "eager")
    assert told["graphs"] == [5, 5]
    assert told["of_movement"] < 1e-5
