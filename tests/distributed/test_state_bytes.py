"""State is split like the weights: a process of n holds an n-th of it, to 5 percent. ``state_bytes.py`` runs there."""

import pytest

OPTIMIZERS = [
    "Lion", "GaLoreAdamW8bit", "GaLoreAdamW8bit Q-GaLore", "GaLoreAdafactor", "GaLoreLion", "GaLorePlusAdamW",
    "FiraAdamW", "GradNormLoRPAdamW", "DCTAdamW", "DCTAdamW fed back in 8 bits", "APOLLOAdamW", "APOLLOAdamW svd",
    "LDAdamW", "SLTrainAdamW", "SSTAdamW", "ReLoRAAdamW", "RigLAdamW", "SRigLAdamW", "BlockSparseAdamW",
]  # fmt: skip
CELLS = [{"optimizer": name, "stage": 1 + i % 3, "keys": {}} for i, name in enumerate(OPTIMIZERS)]
CELLS += [{"optimizer": name, "stage": stage, "keys": {}} for name in ("AdamW", "GaLoreAdamW") for stage in (1, 2, 3)]
CELLS += [
    {"optimizer": name, "stage": stage, "keys": {"shard_basis": True}}
    for name, stage in (("GaLoreAdamW", 1), ("GaLoreAdamW8bit Q-GaLore", 2), ("LDAdamW", 3), ("FiraAdamW", 3))
]


@pytest.fixture(scope="module")
def measured(pool):
    told = {}

    def on(ranks):
        if ranks not in told:
            told[ranks] = pool.call(ranks, "state_bytes:measure", CELLS, timeout=600)
        return told[ranks]

    return on


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("number", range(len(CELLS)), ids=lambda i: " ".join(map(str, CELLS[i].values())))
def test_a_process_holds_its_part_of_the_state(measured, ranks, number):
    """Beside it, all of the basis where each process keeps it."""
    told = measured(ranks)[number]
    basis = 0 if CELLS[number]["keys"] else told["basis"]
    moments = told["alone"] - basis
    assert told["most"] <= 1.05 * moments / ranks + basis, told
    clocks = (
        200 if CELLS[number]["optimizer"] == "AdamW" else 0
    )  # torch's has one for a flat tensor, not one a parameter
    assert ranks * told["most"] >= moments - clocks, "nothing is lost"
    masked = CELLS[number]["optimizer"] in ("RigLAdamW", "SRigLAdamW")  # how much of a mask is here, only masks know
    assert told["off plan"] <= 0.01 * told["alone"] / ranks * masked, "planned before there were processes"
