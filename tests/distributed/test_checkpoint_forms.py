"""DDP and FSDP2 go on to the bit from every form that torch.distributed.checkpoint has, on two processes.

In one process: tests/optim/test_distributed_checkpoint.py. More or fewer processes: test_fsdp_checkpoints.py.
"""

import pytest
from catalogue import OVER_PROCESSES

CELLS = [
    {"layout": "fsdp2", "large": True, "forms": ["flattened"]},
    {"layout": "fsdp2", "optimizer": "RigLAdamW", "forms": ["flattened", "of process 0"]},
    {"layout": "fsdp2", "optimizer": "CastAdamS", "forms": ["flattened"]},
    {"layout": "ddp", "optimizer": "GaLoreAdamW", "forms": ["of process 0"]},
    {"layout": "ddp", "optimizer": "BlockSparseAdamW", "forms": ["flattened"]},
]
THOROUGH = [{"layout": layout, "optimizer": name} for layout in ("fsdp2", "ddp") for name in OVER_PROCESSES]


def names(cells):
    return [f"{cell.get('optimizer', '8 bits')} {cell['layout']}" for cell in cells]


@pytest.fixture(scope="module")
def told(pool, tmp_path_factory):
    return pool.call(2, "checkpoint_forms:measure", CELLS, str(tmp_path_factory.mktemp("forms")))


@pytest.fixture(scope="module")
def told_thoroughly(pool, tmp_path_factory):
    return pool.call(2, "checkpoint_forms:measure", THOROUGH, str(tmp_path_factory.mktemp("forms")), timeout=900)


@pytest.mark.parametrize("number", range(len(CELLS)), ids=names(CELLS))
def test_a_fresh_optimizer_goes_on_to_the_bit(told, number):
    assert told[number].keys() == set(CELLS[number]["forms"])
    assert not any(told[number].values())


@pytest.mark.thorough
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(len(THOROUGH)), ids=names(THOROUGH))
def test_every_class_does_from_every_form(told_thoroughly, number):
    assert not any(told_thoroughly[number].values())
