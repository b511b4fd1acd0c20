"""``torch.compile(lambda: optimizer.step())`` under FSDP2 on two processes: the step is kept out of the graph.

In one process: tests/optim/test_torch_bar.py.
"""

import pytest
from catalogue import OVER_PROCESSES

CLASSES = ["GaLoreAdamW", "RigLAdamW"]
THOROUGH = [name for name in OVER_PROCESSES if name not in CLASSES]


@pytest.fixture(scope="module")
def told(pool):
    return pool.call(2, "compiled_steps:measure", [{"optimizer": name} for name in CLASSES])


@pytest.fixture(scope="module")
def told_thoroughly(pool):
    return pool.call(2, "compiled_steps:measure", [{"optimizer": name} for name in THOROUGH], timeout=600)


@pytest.mark.parametrize("number", range(len(CLASSES)), ids=CLASSES)
def test_it_has_the_bits_of_a_step_and_no_graph(told, number):
    assert told[number] == (True, 0)


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(len(THOROUGH)), ids=THOROUGH)
def test_so_has_every_class(told_thoroughly, number):
    assert told_thoroughly[number] == (True, 0)
