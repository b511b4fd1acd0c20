"""What the optimizer tests share."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def oracle():
    """The dense references of tests/oracle/galore.py, loaded by path: the tests are no package."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "oracle" / "galore.py")))
