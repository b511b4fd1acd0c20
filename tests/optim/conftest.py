"""What the optimizer tests share."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait on each other in tiny BLAS calls when the machine is busy
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def oracle():
    """The dense references of tests/oracle/galore.py, loaded by path: the tests are no package."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "oracle" / "galore.py")))
