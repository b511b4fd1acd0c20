"""Replicas choose the same masks. ``masked_replicas.py`` runs in the processes."""

import json
from pathlib import Path

import pytest


@pytest.mark.thorough
def test_replicas_that_begin_with_other_weights_have_the_masks_of_process_0(torchrun, tmp_path):
    """The engine gives all of them its weights only after the optimizer was built."""
    worker = Path(__file__).with_name("masked_replicas.py")
    process = torchrun(2, str(worker), str(tmp_path / "told.json"))
    assert process.returncode == 0, process.stdout[-3000:]
    for name, told in json.loads((tmp_path / "told.json").read_text()).items():
        assert told["same"], name
        assert sum(told["counts"]) == round(0.3 * 420), name
