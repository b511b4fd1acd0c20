"""The launches of a step at the matrices of a LLaMA-1B, as the results tell them."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "launches.py"
ORDINARY = {  # of an ordinary step, and of the busiest after the first
    "GaLoreAdamW iterate": (400, 1500),
    "FiraAdamW": (800, 1500),
}
THOROUGH = {
    "GaLoreAdamW8bit": (800, 1500),
    "GaLoreAdafactor": (800, 1600),
    "GaLoreLion": (400, 1500),
    "GaLorePlusAdamW": (600, 2700),
    "APOLLOAdamW": (800, 800),
    "GradNormLoRPAdamW": (2400, 16000),
    "DCTAdamW": (400, 1900),
    "LDAdamW": (2500, 2500),
    "SLTrainAdamW": (100, 100),
    "ReLoRAAdamW": (100, 1600),
    "SSTAdamW": (400, 7200),
}
THOROUGHLY = [pytest.param(name, marks=pytest.mark.thorough) for name in THOROUGH]


@pytest.mark.parametrize("name", [*ORDINARY, *THOROUGHLY])
def test_a_step_launches_no_more_than_it_should(name):
    done = subprocess.run([sys.executable, str(SCRIPT), name], capture_output=True, text=True, timeout=200, check=True)
    rows = {cells[0]: cells[1:] for line in done.stdout.splitlines()[2:] for cells in [line.strip("| ").split(" | ")]}
    launches, waits, busiest, waits_then = map(int, rows[name])
    most, most_at_once = {**ORDINARY, **THOROUGH}[name]
    assert 0 < launches <= most
    assert launches <= busiest <= most_at_once
    assert waits == 0
    assert waits_then <= 1 or name in ("GaLorePlusAdamW", "ReLoRAAdamW", "SSTAdamW")
