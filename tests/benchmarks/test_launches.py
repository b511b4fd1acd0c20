"""The launches of a step at the matrices of a LLaMA-1B, as the results tell them."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "launches.py"
MOST = {"GaLoreAdamW iterate": 400}
# Of sparse methods: an ordinary step; the busiest one, where masks change or thresholds are sought; and its waits.
SPARSE = {
    "SRigLAdamW": (500, 3000, 12),
    "SETAdamW": (500, 2500, 1),
    "RigLAdamW": (500, 2000, 1),
    "BlockSparseAdamW": (550, 2600, 1),
    "SRSTEAdamW decoupled": (900, 900, 0),
    "CastAdamS": (1000, 1700, 0),
    "HyperSparseAdamW": (750, 3500, 1),
    "WGSEFAdamW": (500, 500, 0),
}
FIRST = next(iter(SPARSE))


def told(name):
    done = subprocess.run([sys.executable, str(SCRIPT), name], capture_output=True, text=True, timeout=200, check=True)
    rows = {cells[0]: cells[1:] for line in done.stdout.splitlines()[2:] for cells in [line.strip("| ").split(" | ")]}
    return map(int, rows[name])


@pytest.mark.parametrize("name", MOST)
def test_an_ordinary_step_launches_no_more_than_it_should(name):
    launches, waits, busiest, waits_then = told(name)
    assert 0 < launches <= MOST[name]
    assert waits == 0
    assert waits_then <= 1
    assert busiest >= launches


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == FIRST else pytest.mark.thorough) for name in SPARSE]
)
def test_a_sparse_method_launches_no_more_than_it_should(name):
    launches, waits, busiest, waits_then = told(name)
    most, busy, stops = SPARSE[name]
    assert 0 < launches <= most
    assert launches <= busiest <= busy
    assert waits == 0
    assert waits_then <= stops
