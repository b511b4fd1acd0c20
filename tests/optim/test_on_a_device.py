"""A step on a device: no mixing, no waiting between refreshes, the numbers of the CPU; and on one without fp64. The
device is pretended, by ``pretended_steps.py``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from catalogue import VARIANTS, one_of_each_state

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


OURS = [name for name, variant in VARIANTS.items() if variant.cls is not torch.optim.AdamW]
SOME = [*one_of_each_state(OURS), "LDAdamW", "SSTAdamW"]


def pretended(*names):
    script = Path(__file__).with_name("pretended_steps.py")
    command = [sys.executable, str(script), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def told():
    return pretended("all", *SOME)


@pytest.fixture(scope="module")
def others_without_fp64():
    return pretended(*(name for name in OURS if name not in SOME))


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


@pytest.mark.parametrize("name", SOME)
def test_a_step_needs_no_fp64(told, name):
    check_without_fp64(told["without fp64"]["variants"][name])


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in OURS if name not in SOME])
def test_a_step_of_the_other_variants_needs_no_fp64(others_without_fp64, name):
    check_without_fp64(others_without_fp64["without fp64"]["variants"][name])


def check_without_fp64(found):
    """As with it, but for roundings in fp32, of which a step of Adam makes more; masks are the same."""
    assert "refused" not in found, found
    assert found["moved"] > 0
    assert found["apart"] < 1e-4 * found["moved"]
    assert found["zeros"][0] == found["zeros"][1]
    assert found["oblique"] < 1e-5


def test_what_computes_in_fp64_does_so_for_a_device_without(told):
    computed = told["without fp64"]["computed"]
    assert {name: apart for name, apart in computed.items() if not (isinstance(apart, float) and apart < 1e-5)} == {}
    assert len(computed) == 10


def test_the_device_without_fp64_refuses_it(told):
    refused = told["without fp64"]["refused"]
    assert refused == ["on", "moved on", "made", "cast", "summed", "moved off and cast", "copied off"]
