"""Layers of experts, one tensor each, split over processes, beside one process. ``sparse_experts.py`` runs in the
processes."""

import pytest


def cell(optimizer, layout, **options):
    return {"optimizer": optimizer, "layout": layout, **options}


# FSDP2 gives each process whole experts, ZeRO cuts them anywhere.
ON = {
    "2": [
        cell("SETAdamW", "fsdp2"),
        cell("SRigLAdamW", "zero3"),
        cell("BlockSparseAdamW", "zero2"),
        cell("CastAdamS", "zero3"),
        cell("WGSEFAdamW columns", "zero1"),
    ],
    "2 thorough": [
        cell("SETAdamW", "zero1"),
        cell("RigLAdamW", "fsdp2"),
        cell("SRigLAdamW", "fsdp2"),
        cell("SparseAdamW", "zero3", zero={"sub_group_size": 200}),
        cell("SRSTEAdamW", "zero2"),
        cell("HyperSparseAdamW", "fsdp2"),
        *(cell(name, "fsdp2") for name in ("BlockSparseAdamW", "SparseAdamW", "SRSTEAdamW", "CastAdamS")),
        *(cell(name, "zero1") for name in ("RigLAdamW", "SRigLAdamW", "SparseAdamW", "CastAdamS", "HyperSparseAdamW")),
        *(cell(name, "zero3") for name in ("SETAdamW", "RigLAdamW", "BlockSparseAdamW", "WGSEFAdamW blocks")),
        *(cell(f"WGSEFAdamW{groups}", "fsdp2") for groups in ("", " columns", " blocks")),
        cell("RigLAdamW", "zero3", zero_init=True, clip=0.05),
        cell("SRigLAdamW", "ddp"),
        *(cell(name, "fsdp2", transposed=True) for name in ("SRigLAdamW", "SRSTEAdamW", "CastAdamS")),
    ],
    "4 thorough": [
        cell("SRigLAdamW", "zero3"),
        cell("BlockSparseAdamW", "fsdp2"),
        cell("SETAdamW", "fsdp2"),
        cell("RigLAdamW", "zero3"),
        cell("SparseAdamW", "zero2"),
        cell("WGSEFAdamW", "fsdp2"),
        cell("WGSEFAdamW", "zero3"),
        cell("HyperSparseAdamW", "zero2"),
        cell("SRSTEAdamW", "zero3"),
    ],
}


@pytest.fixture(scope="module")
def results(pool):
    """All cells of one number of processes run in one job."""
    told = {}

    def of(launch):
        if launch not in told:
            told[launch] = pool.call(int(launch.split()[0]), "sparse_experts:measure", ON[launch], timeout=600)
        return told[launch]

    return of


@pytest.mark.parametrize(
    ("launch", "number"),
    [
        pytest.param(launch, number, marks=pytest.mark.thorough if "thorough" in launch else ())
        for launch, cells in ON.items()
        for number in range(len(cells))
    ],
    ids=lambda value: str(value),
)
def test_experts_split_over_processes_are_what_they_are_in_one(results, launch, number):
    told = results(launch)[number]
    assert told["holds"], told
    assert told["replayed"] == 0.0, "fed the same gradients, to the bit"
    assert told["layout"] == "ddp" or told["state_bytes"] < 0.8 * told["state_bytes_alone"]
