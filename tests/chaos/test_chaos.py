"""The chaos run itself: a few faults on one process. `make chaos` has them all."""

import random

import pytest
from chaos import disturbed
from chaos.disturbed import Disturbed
from chaos.kinds import FULL
from chaos.layouts import LAYOUTS, write_config


@pytest.fixture
def run(pool, tmp_path):
    made = Disturbed(LAYOUTS[0], pool, write_config(tmp_path, 30), tmp_path, random.Random(3))
    made.launches = False
    return made


def test_a_run_that_suffers_ends_as_the_undisturbed_one(run, capsys):
    run.suffer(3)
    out = capsys.readouterr().out
    assert not run.failures, out
    assert run.counts.total() >= 3
    assert run.counts[FULL] == 0, "that needs a file system of its own"
    assert out.count("every loss and weight as undisturbed") >= 1
    assert not any(run.folder.glob("run-*")), "nothing is left"


def test_a_run_that_ends_otherwise_is_a_failure(run, monkeypatch):
    found = disturbed.found_by

    def other(folder):
        told = found(folder)
        return told if folder.name == "whole" else {**told, "validation loss": told["validation loss"] + 1e-12}

    monkeypatch.setattr(disturbed, "found_by", other)
    run.suffer(1)
    assert "other validation loss than undisturbed" in run.failures[0]
