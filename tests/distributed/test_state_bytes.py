"""State is split like the weights: a process of n holds an n-th of it, to 5 percent. ``state_bytes.py`` runs there."""

import pytest
from catalogue import OVER_PROCESSES

# But for GaLoreAdamW, which is in every stage, variants whose state is another's in kind and size, and masks that only
# grow into their size.
LEFT_OUT = ("GaLoreAdamW", "GaLoreAdamW svd", "GaLoreLion", "DCTAdamW", "DCTAdamW fed back", "APOLLOAdamW Mini",
            "APOLLOAdamW svd", "SCALE l2", "SLTrainAdamW8bit", "SETAdamW", "SparseAdamW", "SRSTEAdamW", "CastAdamS",
            "HyperSparseAdamW")  # fmt: skip
OPTIMIZERS = [name for name in OVER_PROCESSES if name not in LEFT_OUT and not name.startswith("WGSEF")]
CELLS = [{"optimizer": name, "stage": 1 + i % 3, "keys": {}} for i, name in enumerate(OPTIMIZERS)]
CELLS += [{"optimizer": "GaLoreAdamW", "stage": stage, "keys": {}} for stage in (1, 2, 3)]
CELLS += [{"optimizer": "AdamW", "stage": 3, "keys": {}}]
CELLS += [
    {"optimizer": name, "stage": stage, "keys": {"shard_basis": True}}
    for name, stage in (("GaLoreAdamW", 1), ("GaLoreAdamW8bit Q-GaLore", 2), ("LDAdamW", 3), ("FiraAdamW", 3))
]
CELLS += [
    {"optimizer": name, "stage": stage, "keys": {}, "mixture": mixture}
    for name, stage, mixture in (
        ("GaLoreAdamW", 1, "mixtral"),
        ("LDAdamW", 2, "qwen3_moe"),
        ("GaLoreAdamW", 3, "deepseek_v3"),
        ("APOLLOAdamW", 3, "gpt_oss"),
    )
]
# On four processes one of each stage, and one whose basis is split too.
ON_FOUR = [
    i
    for i, cell in enumerate(CELLS)
    if (cell["optimizer"], cell["stage"]) in (("Lion", 1), ("GaLoreAdamW", 2), ("LDAdamW", 3))
]
RUNS = {"2": (2, range(len(CELLS))), "4": (4, ON_FOUR)}
RUNS["4 thorough"] = 4, [i for i in range(len(CELLS)) if i not in ON_FOUR]


@pytest.fixture(scope="module")
def measured(pool):
    told = {}

    def on(run):
        if run not in told:
            ranks, numbers = RUNS[run]
            results = pool.call(ranks, "state_bytes:measure", [CELLS[i] for i in numbers], timeout=600)
            told[run] = dict(zip(numbers, results, strict=True))
        return told[run]

    return on


@pytest.mark.parametrize(
    ("run", "number"),
    [
        pytest.param(
            run, i, id=f"{' '.join(map(str, CELLS[i].values()))}-{run}",
            marks=pytest.mark.thorough if "thorough" in run else (),
        )
        for run, (_, numbers) in RUNS.items()
        for i in numbers
    ],
)  # fmt: skip
def test_a_process_holds_its_part_of_the_state(measured, run, number):
    """Beside it, all of the basis where each process keeps it."""
    ranks, told = RUNS[run][0], measured(run)[number]
    basis = 0 if CELLS[number]["keys"] else told["basis"]
    moments = told["alone"] - basis
    assert told["most"] <= 1.05 * moments / ranks + basis, told
    clocks = (
        200 if CELLS[number]["optimizer"] == "AdamW" else 0
    )  # torch's has one for a flat tensor, not one a parameter
    assert ranks * told["most"] >= moments - clocks, "nothing is lost"
    # how much of a mask is here, only masks know
    masked = CELLS[number]["optimizer"] in ("RigLAdamW", "SRigLAdamW", "SparseAdamW frozen")
    assert told["off plan"] <= 0.01 * told["alone"] / ranks * masked, "planned before there were processes"
