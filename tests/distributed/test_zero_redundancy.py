"""Under torch's ZeroRedundancyOptimizer a run has the bits of DistributedDataParallel's, or is refused in one line."""

import pytest
from catalogue import OVER_PROCESSES

CELLS = [
    {"optimizer": "GaLorePlusAdamW"},  # random numbers by a matrix's place among all, and bases by columns
    {"optimizer": "SRigLAdamW", "buckets": True},
    {"optimizer": "BlockSparseAdamW"},
    {"optimizer": "RigLAdamW", "defaults": {"distribution": "lamp"}},
]
REFUSED = {
    "SSTAdamW": "U, V and sigma of a layer",
    "ReLoRAAdamW": "A and B of a layer",
    "HyperSparseAdamW": "the matrices of a group",
}
THOROUGH = [{"optimizer": name} for name in OVER_PROCESSES if name not in REFUSED]


def names(cells):
    return [cell["optimizer"] for cell in cells]


@pytest.fixture(scope="module")
def told(pool):
    return pool.call(2, "zero_redundancy:measure", [*CELLS, *({"optimizer": name} for name in REFUSED)])


@pytest.fixture(scope="module")
def told_thoroughly(pool):
    return pool.call(2, "zero_redundancy:measure", THOROUGH, timeout=600)


@pytest.mark.parametrize("number", range(len(CELLS)), ids=names(CELLS))
def test_it_is_the_run_of_replicas(told, number):
    """Before the first step, after each, and from a consolidated state."""
    assert told[number] == ""


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=REFUSED)
def test_what_needs_several_parameters_is_refused(told, number):
    name, together = list(REFUSED.items())[number]
    assert told[len(CELLS) + number] == (
        f"{name} must step {together} together, and ZeroRedundancyOptimizer gives each process some parameters; "
        "leave it away, or split the model by FSDP2 or DeepSpeed"
    )


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(len(THOROUGH)), ids=names(THOROUGH))
def test_so_is_every_class(told_thoroughly, number):
    assert told_thoroughly[number] == ""
