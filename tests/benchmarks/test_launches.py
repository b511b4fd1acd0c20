"""The launches of a step at the matrices of a LLaMA-1B, as the results tell them."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "launches.py"
MOST = {"GaLoreAdamW iterate": 400}


@pytest.mark.parametrize("name", MOST)
def test_an_ordinary_step_launches_no_more_than_it_should(name):
    done = subprocess.run([sys.executable, str(SCRIPT), name], capture_output=True, text=True, timeout=200, check=True)
    rows = {cells[0]: cells[1:] for line in done.stdout.splitlines()[2:] for cells in [line.strip("| ").split(" | ")]}
    launches, waits, busiest, waits_then = map(int, rows[name])
    assert 0 < launches <= MOST[name]
    assert waits == 0
    assert waits_then <= 1
    assert busiest >= launches
