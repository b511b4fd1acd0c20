"""The launches of a step at the matrices of a LLaMA-1B, as the results tell them."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "launches.py"
# Of an ordinary step; of the busiest after the first, where subspaces are found, masks change or thresholds are sought;
# and its waits for the device.
ALWAYS = {
    "GaLoreAdamW iterate": (400, 1500, 1),
    "FiraAdamW": (650, 1700, 1),
    "SRigLAdamW": (400, 2700, 10),
}
THOROUGH = {
    "GaLoreAdamW8bit": (800, 1900, 1),
    "GaLoreAdafactor": (800, 1900, 1),
    "GaLoreLion": (430, 1600, 1),
    "GaLorePlusAdamW": (600, 3500, 400),
    "APOLLOAdamW": (800, 800, 0),
    "GradNormLoRPAdamW": (1400, 15000, 1),
    "DCTAdamW": (400, 1900, 1),
    "LDAdamW": (2500, 2500, 1),
    "SLTrainAdamW": (100, 100, 1),
    "SLTrainAdamW8bit": (800, 800, 1),
    "ReLoRAAdamW": (100, 1600, 600),
    "SSTAdamW": (400, 7200, 2000),
    "SETAdamW": (400, 2300, 1),
    "RigLAdamW": (400, 1800, 1),
    "BlockSparseAdamW": (410, 2400, 1),
    "SRSTEAdamW decoupled": (1300, 1300, 0),
    "CastAdamS": (1500, 2800, 0),
    "HyperSparseAdamW": (1200, 3700, 1),
    "WGSEFAdamW": (700, 700, 0),
}
THOROUGHLY = [pytest.param(name, marks=pytest.mark.thorough) for name in THOROUGH]


@pytest.mark.parametrize("name", [*ALWAYS, *THOROUGHLY])
def test_a_step_launches_no_more_than_it_should(name):
    done = subprocess.run([sys.executable, str(SCRIPT), name], capture_output=True, text=True, timeout=200, check=True)
    rows = {cells[0]: cells[1:] for line in done.stdout.splitlines()[2:] for cells in [line.strip("| ").split(" | ")]}
    launches, waits, busiest, waits_then = map(int, rows[name])
    most, most_at_once, stops = {**ALWAYS, **THOROUGH}[name]
    assert 0 < launches <= most
    assert launches <= busiest <= most_at_once
    assert waits == 0
    assert waits_then <= stops
