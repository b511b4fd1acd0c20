"""Every optimizer, split over processes in every way, beside one process. ``cells.py`` runs in the processes."""

import pytest
from catalogue import OVER_PROCESSES, VARIANTS, classes_of, public_optimizers

from gracile import optim


def cell(optimizer, layout, **options):
    return {"optimizer": optimizer, "layout": layout, **options}


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SHARD_BASIS = {"keys": {"shard_basis": True}}
EXPERTS = {"experts": 4, "rank": 3}
LARGE = {"sizes": [96, 401, 113], "rank": 12}  # moments of at least 4096 numbers, so that they are held in 8 bits

# Every layout and option, and every kind of class, at least once; on 4 processes those that no run has which goes on on
# fewer (test_fsdp_checkpoints.py, test_full_state.py). matrix.py has every pair.
ON = {
    2: [
        cell("Lion", "zero3", accumulation=2),
        cell("GaLoreAdamW", "zero1", proj_type="left"),
        cell("GaLoreAdamW", "zero2", zero={"reduce_scatter": False}),
        cell("GaLoreAdamW", "fsdp2", proj_type="reverse_std", clip=0.05),
        cell("GaLoreAdamW", "zero3", zero_init=True, proj_type="left"),
        cell("GaLoreAdafactor", "zero2", zero=OFFLOAD),
        cell("GaLoreLion", "zero0"),
        cell("GaLorePlusAdamW", "zero3", accumulation=2, clip=0.05),
        cell("FiraAdamW", "zero1"),
        cell("GradNormLoRPAdamW", "zero2", zero={"round_robin_gradients": True}),
        cell("DCTAdamW", "zero1", accumulation=2),
        cell("DCTAdamW fed back", "zero3", zero={"sub_group_size": 200}),
        cell("APOLLOAdamW", "ddp"),
        cell("APOLLOAdamW Mini", "zero2", zero={"overlap_comm": True}),
        cell("APOLLOAdamW svd", "zero3", zero=OFFLOAD, nccl=True),
        cell("LDAdamW", "zero3", zero={"sub_group_size": 200}),
        cell("GaLoreAdamW svd", "zero3", **SHARD_BASIS),
        cell("GaLoreAdamW8bit", "zero2", **LARGE),
        cell("GaLoreAdamW8bit Q-GaLore", "zero1", **LARGE, **SHARD_BASIS),
        cell("FiraAdamW", "zero1", precision="bf16, fp32 gradients", accumulation=2),
        cell("GaLoreAdamW", "zero3", precision="bf16", proj_type="left", zero=OFFLOAD),
        cell("SCALE", "ddp"),
        cell("SCALE", "zero1", accumulation=2),
        cell("SCALE", "zero2", zero={"round_robin_gradients": True}),
        cell("SCALE", "zero3", zero={"sub_group_size": 200}),
        cell("SCALE l2", "zero3", zero=OFFLOAD, nccl=True),
        cell("SCALE", "fsdp2", clip=0.05),
        cell("SLTrainAdamW", "zero2"),
        cell("SLTrainAdamW8bit", "zero3", **LARGE),
        cell("SSTAdamW", "ddp"),
        cell("SSTAdamW", "zero1", zero={"round_robin_gradients": True}, accumulation=2),
        cell("SSTAdamW", "zero3", zero=OFFLOAD, nccl=True),
        cell("SSTAdamW", "zero3", rank=13),
        cell("ReLoRAAdamW", "fsdp2"),
        cell("ReLoRAAdamW", "zero3", clip=0.05, zero={"stage3_param_persistence_threshold": 100_000}),
        cell("RigLAdamW", "zero3", zero={"sub_group_size": 200}, clip=0.05),
        cell("SRSTEAdamW", "zero2", zero={"round_robin_gradients": True}, accumulation=2),
        cell("CastAdamS", "zero3", zero=OFFLOAD, nccl=True),
        cell("GaLoreAdamW", "zero1", zero={"round_robin_gradients": True}, accumulation=2, **EXPERTS),
        cell("GaLoreAdafactor", "fsdp2", clip=0.05, **EXPERTS),
        cell("GaLorePlusAdamW", "zero3", zero={"sub_group_size": 200}, **EXPERTS),
        cell("APOLLOAdamW svd", "zero3", zero=OFFLOAD, nccl=True, **EXPERTS),
    ],
    4: [
        cell("GaLoreAdafactor", "zero1", clip=0.05),
        cell("FiraAdamW", "fsdp2", accumulation=2),
        cell("GaLoreAdamW8bit", "zero3", proj_type="left", **LARGE),
        cell("GaLorePlusAdamW", "zero2", precision="bf16", **SHARD_BASIS),
        cell("SCALE", "zero1"),
        cell("SRigLAdamW", "zero3"),
        cell("CastAdamS", "zero3", precision="bf16, fp32 gradients"),
        cell("GaLoreAdamW8bit", "zero2", sizes=[24, 901, 28], rank=5, experts=3),
        cell("DCTAdamW fed back", "fsdp2", proj_type="left", **EXPERTS),
    ],
}
# Masks are chosen in one place for all classes and layouts: what is left of them. And what another cell has of the same
# class in another layout, or of another class in the same.
THOROUGH = {
    2: [
        cell("GaLoreAdamW", "zero1", zero={"round_robin_gradients": True}),
        cell("GaLoreAdafactor", "zero3"),
        cell("FiraAdamW", "zero3", zero={"overlap_comm": True}),
        cell("GaLoreAdamW8bit Q-GaLore", "zero3", clip=0.05),
        cell("ReLoRAAdamW", "zero2", precision="bf16"),
        cell("SRSTEAdamW", "zero3", zero={"sub_group_size": 200}, clip=0.05),
        cell("SRigLAdamW", "zero2", zero={"round_robin_gradients": True}, accumulation=2),
        cell("CastAdamS", "zero1"),
        cell("SETAdamW", "ddp"),
        cell("SETAdamW", "zero1", zero={"round_robin_gradients": True}),
        cell("SETAdamW", "zero3", zero=OFFLOAD, nccl=True),
        cell("SETAdamW", "fsdp2"),
        cell("RigLAdamW", "zero0"),
        cell("RigLAdamW", "zero1", zero=OFFLOAD),
        cell("RigLAdamW", "zero3", zero_init=True),
        cell("RigLAdamW", "zero2", precision="bf16"),
        cell("SRigLAdamW", "zero1", zero={"overlap_comm": True}),
        cell("SRigLAdamW", "zero3", zero_init=True, clip=0.05, accumulation=2),
        cell("SRigLAdamW", "fsdp2"),
        cell("BlockSparseAdamW", "zero1"),
        cell("BlockSparseAdamW", "zero3", zero={"sub_group_size": 200}),
        cell("BlockSparseAdamW", "fsdp2", precision="bf16"),
        cell("SparseAdamW", "zero2", zero={"reduce_scatter": False}),
        cell("SparseAdamW", "zero3", clip=0.05),
        cell("SparseAdamW", "fsdp2"),
        cell("SparseAdamW frozen", "zero1"),
        cell("SparseAdamW frozen", "zero2", precision="bf16"),
        cell("SparseAdamW frozen", "zero3", zero={"sub_group_size": 200}),
        cell("SparseAdamW frozen", "fsdp2", clip=0.05),
    ],
    4: [
        cell("Lion", "fsdp2"),
        cell("GaLoreAdamW", "zero3"),
        cell("GaLoreAdamW", "zero3", zero_init=True, proj_type="left", **EXPERTS),
        cell("GradNormLoRPAdamW", "zero2", precision="bf16", **EXPERTS),
        cell("LDAdamW", "zero1", **EXPERTS, keys={"shard_basis": True}),
        cell("GaLoreAdamW8bit", "fsdp2"),
        cell("GradNormLoRPAdamW", "zero3", proj_type="left"),
        cell("LDAdamW", "fsdp2", proj_type="left", **SHARD_BASIS),
        cell("SSTAdamW", "fsdp2"),
        cell("SRSTEAdamW", "fsdp2"),
        cell("GaLorePlusAdamW", "zero2", proj_type="left"),
        cell("DCTAdamW", "zero3", proj_type="reverse_std"),
        cell("APOLLOAdamW", "zero1", zero={"round_robin_gradients": True}),
        cell("RigLAdamW", "fsdp2"),
        cell("ReLoRAAdamW", "zero3"),
        cell("SETAdamW", "zero3", zero_init=True),
        cell("RigLAdamW", "zero1"),
        cell("SRigLAdamW", "fsdp2"),
        cell("BlockSparseAdamW", "zero3"),
        cell("SparseAdamW", "zero2"),
    ],
}
LAYOUTS = {"ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"}
OPTIONS = {"accumulation", "clip", "keys", "nccl", "precision", "proj_type", "zero_init"}
OPTIONS |= {"offload_optimizer", "overlap_comm", "reduce_scatter", "round_robin_gradients", "sub_group_size"}


def test_each_layout_option_and_kind_of_state_is_in_some_cell():
    """Of the classes with masks, which share their way over processes, a few; all are in the thorough part."""
    cells = [*ON[2], *ON[4]]
    assert {c["layout"] for c in cells} == LAYOUTS
    assert {option for c in cells for option in [*c, *c.get("zero", {})]} >= OPTIONS
    states = {VARIANTS[c["optimizer"]].state for c in cells}
    assert {VARIANTS[name].state for name in OVER_PROCESSES} - states <= {
        "errors in 8 bits",
        "masks of blocks",
        "masks at the end",
        "masks of groups",
    }
    both = [c["optimizer"] for c in cells + THOROUGH[2] + THOROUGH[4]]
    assert public_optimizers() - classes_of(both) == {optim.HyperSparseAdamW, optim.WGSEFAdamW}, "whom the matrix has"


LAUNCHES = {str(ranks): cells for ranks, cells in ON.items()}
LAUNCHES |= {f"{ranks} thorough": cells for ranks, cells in THOROUGH.items()}


@pytest.fixture(scope="module")
def results(pool):
    """All cells of one number of processes run in one job."""
    told = {}

    def of(launch):
        if launch not in told:
            told[launch] = pool.call(int(launch.split()[0]), "cells:measure", LAUNCHES[launch], timeout=600)
        return told[launch]

    return of


@pytest.mark.parametrize(
    ("launch", "number"),
    [
        pytest.param(launch, number, marks=pytest.mark.thorough if "thorough" in launch else ())
        for launch, cells in LAUNCHES.items()
        for number in range(len(cells))
    ],
    ids=lambda value: str(value),
)
def test_split_over_processes_it_is_what_it_is_in_one(results, launch, number):
    """12 steps with two or three refreshes; ``cells.holds`` has the limits. Replicas are equal to the bit, and no
    process holds all of the state."""
    told = results(launch)[number]
    assert {key: told[key] for key in LAUNCHES[launch][number]} == LAUNCHES[launch][number]
    assert told["holds"], told
    if told["layout"] in ("ddp", "zero0"):
        assert told["state_bytes"] == told["state_bytes_alone"]
    else:
        assert told["state_bytes"] < 0.8 * told["state_bytes_alone"]
