"""Checkpoints of DeepSpeed's engine: what is saved, loaded and gone on from. ``checkpoint_cells.py`` runs in the
processes."""

import pytest
import torch
from catalogue import OVER_PROCESSES, classes_of, is_in_8_bits, public_optimizers
from torch import nn

from gracile import optim

LARGE = [24, 1500, 28]  # moments of 4096 elements or more: 8 bits really

THOROUGH = ["SETAdamW", "BlockSparseAdamW", "SparseAdamW", "SRSTEAdamW", "CastAdamS", "HyperSparseAdamW"]
THOROUGH += [name for name in OVER_PROCESSES if name.startswith(("WGSEF", "SCALE"))]
OPTIMIZERS = [name for name in OVER_PROCESSES if name not in THOROUGH]
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
BF16 = {"precision": "bf16"}
BF16_IN_FP32 = {"precision": "bf16, fp32 gradients"}
ELASTIC = {"zero": {"elastic_checkpoint": True}}


def cell(optimizer, stage, **options):
    sizes = {"sizes": LARGE} if is_in_8_bits(optimizer) else {}
    return {"do": "go on", "optimizer": optimizer, "layout": f"zero{stage}", **sizes, **options}


def in_every_stage(optimizers):
    """Plain in one, offloaded and in bf16 in the others. Every second one is loaded into an engine that has already
    trained on other data."""
    return [
        cell(optimizer, stage, proj_type="left" if i % 2 else "std", **option, **({"steps_before": 2} if i % 2 else {}))
        for i, optimizer in enumerate(optimizers)
        for stage, option in zip((1, 2, 3), [({}, OFFLOAD, BF16)[(i + j) % 3] for j in range(3)], strict=True)
    ]


# Those with a codec, and one without, in every stage; of the others one cell each, which together have every stage with
# every option.
KINDS = ["GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdamW8bit Q-GaLore", "DCTAdamW fed back in 8 bits"]
EVERY = in_every_stage([name for name in OPTIMIZERS if name not in KINDS])
ON_TWO = in_every_stage(KINDS) + [c for i, c in enumerate(EVERY) if i % 3 == i // 9 % 3]
REPEATED = [c for c in EVERY if c not in ON_TWO] + in_every_stage(THOROUGH)
ON_TWO += [
    cell("GaLoreAdamW", 0),
    cell("FiraAdamW", 1, **BF16_IN_FP32),
    cell("GaLoreAdafactor", 2, zero={"round_robin_gradients": True}, accumulation=2, clip=0.05),
    cell("GaLoreAdamW", 3, zero={"sub_group_size": 200}, accumulation=2, clip=0.05, steps_before=2),
    cell("LDAdamW", 3, zero_init=True),
]
REFUSED = [cell("GaLoreAdamW", stage, **ELASTIC, do="load", saves=True) for stage in (1, 2)]
REFUSED += [cell("GaLoreAdamW", 0, **BF16, do="start")]

# Of which checkpoints loading on another number of processes is tried.
OTHERS = [ON_TWO.index(c) for c in ON_TWO if c["optimizer"] == "GaLoreAdamW"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def saved(pool, folder):
    """The cells that ran on two processes, each with its folder and results."""
    cells = [{**c, "folder": str(folder / str(i))} for i, c in enumerate(ON_TWO + REFUSED)]
    return [{**c, **told} for c, told in zip(cells, measured(pool, 2, cells), strict=True)]


@pytest.fixture(scope="module")
def saved_thoroughly(pool, folder):
    cells = [{**c, "folder": str(folder / f"thorough{i}")} for i, c in enumerate(REPEATED)]
    return [{**c, **told} for c, told in zip(cells, measured(pool, 2, cells), strict=True)]


def measured(pool, ranks, cells):
    return pool.call(ranks, "checkpoint_cells:measure", cells, timeout=600)


def name(number):
    parts = (ON_TWO + REFUSED)[number]
    return " ".join([parts["optimizer"], parts["layout"], *parts.get("zero", {}), parts.get("precision", "")]).strip()


def test_each_class_is_saved_and_each_option_in_each_stage():
    assert {c["optimizer"] for c in ON_TWO} == set(OPTIMIZERS)
    assert classes_of([c["optimizer"] for c in ON_TWO + REPEATED]) == public_optimizers()
    ways = {(c["layout"], "zero" in c, "precision" in c) for c in ON_TWO[3 * len(KINDS) :]}
    assert len(ways) >= 9


@pytest.mark.parametrize("number", range(len(ON_TWO)), ids=name)
def test_a_new_engine_goes_on_to_the_same_bits(saved, number):
    """All tensors of weights and state on all processes, over a refresh. The file needs no class of this package."""
    assert_goes_on(saved[number], ON_TWO[number])


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(len(REPEATED)))
def test_so_does_one_of_a_class_that_differs_little_from_another(saved_thoroughly, number):
    assert_goes_on(saved_thoroughly[number], REPEATED[number])


def assert_goes_on(told, asked):
    assert {key: told[key] for key in asked} == asked
    assert (told["note"], told["steps"]) == ([4, "steps"], 4)
    assert told["changed"]
    assert told["written"]
    assert told["restored"]
    assert told["weights"]
    assert told["state"]


@pytest.mark.parametrize(
    ("optimizer", "dtypes"),
    [
        ("GaLoreAdamW8bit", {"exp_avg": "uint8", "exp_avg_sq": "uint8", "exp_avg_absmax": "float32"}),
        ("GaLoreAdamW8bit Q-GaLore", {"exp_avg": "uint8", "basis": "uint8", "next_refresh": "int64"}),
        ("DCTAdamW fed back in 8 bits", {"error": "uint8", "error_scale": "float32", "indices": "int32"}),
        ("GaLoreAdamW", {"exp_avg": "float32", "basis": "float32"}),
    ],
    ids=str,
)
def test_the_state_that_went_through_has_its_own_dtypes(saved, optimizer, dtypes):
    """In fp32 and bf16 training; those are the tensors that the test above compares."""
    cells = [told for told in saved[: len(ON_TWO)] if told["optimizer"] == optimizer]
    assert {told["layout"] for told in cells} >= {"zero1", "zero2", "zero3"}
    for told in cells:
        assert told["dtypes"]["step"] == ["float32"]
        assert all(dtype in told["dtypes"][key] for key, dtype in dtypes.items()), told["dtypes"]


@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_processes_is_refused_by_zero(pool, saved, ranks):
    """Its state is cut; without ZeRO it is whole and loads. ``full_state`` is what moves it."""
    cells = [{**saved[i], "do": "load", "saves": False} for i in OTHERS]
    assert {c["layout"] for c in cells} == {"zero0", "zero1", "zero2", "zero3"}
    for c, told in zip(cells, measured(pool, ranks, cells), strict=True):
        assert len(told["raised"]) == ranks
        if c["layout"] == "zero0":
            assert not any(told["raised"]), told["raised"]
            assert told["loaded"]
        else:
            assert all(told["raised"]), told["raised"]
            assert told["untouched"]
            # ZeRO 3 fails before, at the frozen parameter's part, and on processes beyond the second without a file
            words = "must match the size of tensor" if c["layout"] == "zero3" else "used a DP world size of 2 but the"
            assert words in told["raised"][0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_cannot_be_made_into_a_universal_checkpoint(pool, saved, stage, tmp_path):
    """DeepSpeed's own way to another number of processes knows ``exp_avg`` in the shape of the weights alone."""
    told = next(c for c in saved if (c["optimizer"], c["layout"]) == ("GaLoreAdamW", f"zero{stage}"))
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", f"{told['folder']}/saved", "--output_folder", str(tmp_path / "universal")]
    done = pool.run(1, *command)
    assert done.returncode != 0
    assert "KeyError: 'exp_avg'" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("stage", [1, 2])
def test_an_elastic_checkpoint_is_not_loaded(saved, stage):
    told = next(c for c in saved if c.get("zero") == ELASTIC["zero"] and c["layout"] == f"zero{stage}")
    assert all(told["raised"])
    assert told["untouched"]


def test_bf16_without_zero_is_refused_when_the_engine_starts(saved):
    told = next(c for c in saved if c["do"] == "start")
    assert all(error.startswith("UnsupportedLayout: a parameter of shape (45, 24)") for error in told["raised"])


def test_loading_leaves_groups_that_the_constructor_takes():
    optimizer = optim.GaLoreAdamW([nn.Parameter(torch.ones(9, 7))], rank=3)
    optim.GaLoreAdamW(optimizer.param_groups)
    optimizer.load_state_dict(optimizer.state_dict())
    optim.GaLoreAdamW(optimizer.param_groups)
