"""A step on a device: no mixing, no waiting between refreshes, the numbers of the CPU. The device is pretended, by
``pretended_steps.py``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from catalogue import VARIANTS

# Waits and copies from the CPU in the busiest step, for all of three matrices; of what is not here, one.
BUSY = {
    "GaLoreAdamW8bit Q-GaLore": 5,
    "GaLorePlusAdamW": 7,
    "GaLorePlusAdamW heads": 7,
    "APOLLOAdamW svd": 4,
    "SRigLAdamW": 2,
}
# Launches of an ordinary step of three matrices and two other parameters, where these are moved together.
TOGETHER = {
    "Lion": 12,
    "GaLoreAdamW": 10,
    "GaLoreLion": 17,
    "SETAdamW": 12,
    "RigLAdamW": 12,
    "SRigLAdamW": 12,
    "BlockSparseAdamW": 9,
    "SRSTEAdamW": 21,
    "SRSTEAdamW decoupled": 20,
    "CastAdamS": 22,
    "HyperSparseAdamW": 20,
    "HyperSparseAdamW pruned": 14,
    "WGSEFAdamW pruned": 14,
}


@pytest.fixture(scope="module")
def told():
    script = Path(__file__).with_name("pretended_steps.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.quadratic])
def test_a_step_mixes_no_devices_and_waits_at_refreshes_only(told, name):
    found = told["variants"][name]
    waits = [sum(places.values()) for places in found["waits"]][1:]
    assert sum(count > 0 for count in waits) <= 3, found["waits"]  # refreshes on steps 0, 4 and 8, masks after 4 and 8
    assert max(waits) <= BUSY.get(name, 1), found["waits"]
    assert 0 < min(found["launches"]) <= TOGETHER.get(name, 1000)
    assert found["apart"] < 1e-5


def test_the_device_tells_what_waits_and_refuses_a_mix(told):
    device = told["device"]
    assert (device["sum"], device["one"], device["three"]) == (6.0, [1, 1], 3)
    assert "same device" in device["mixed"]
