"""Gradients freed in backward under DistributedDataParallel: the run that plain DDP has, what is sent, what is
refused."""

import pytest
import torch
from catalogue import OVER_PROCESSES, VARIANTS
from helpers import same, weights

SOME = ("GaLoreAdamW8bit", "RigLAdamW", "HyperSparseAdamW", "ReLoRAAdamW")
KEEPING = [name for name in OVER_PROCESSES if VARIANTS[name].cls.keeps_coordinates]
REDUCED = [name for name in KEEPING if name != "SparseAdamW"]  # whose masks grow by momentum
NOTHING, COORDINATES = "nothing", "coordinates"


def compared(pool, ranks, names, keep, **more):
    cells = [({"optimizer": name, **more}, keep) for name in names]
    told = pool.call(ranks, "released_ddp_parts:compare", cells, timeout=400)
    assert len(told) == len(names)
    return told


@pytest.mark.parametrize("names", [SOME, pytest.param(OVER_PROCESSES, marks=pytest.mark.thorough, id="all")])
def test_on_two_processes_a_class_moves_as_by_an_ordinary_step_to_the_bit(names, pool):
    """Over refreshes, changes of masks, a pruning and a merge; the processes begin with different weights."""
    told = compared(pool, 2, names, NOTHING)
    assert not any(told.values()), told


def test_parameters_of_the_model_itself_and_tied_ones(pool):
    """Experts in one tensor, and an embedding that is the head too: DDP has names of its own for them."""
    assert pool.call(2, "released_ddp_parts:named_otherwise") == {NOTHING: 0.0}
    told = pool.call(2, "released_ddp_parts:compare", [({"optimizer": "GaLoreAdamW", "experts": 3}, NOTHING)])
    assert not any(told.values()), told


@pytest.mark.thorough
def test_on_four_processes_it_moves_so_to_rounding(pool):
    """Of fp64: in fp32 a last bit may decide over a code in 8 bits."""
    told = compared(pool, 4, OVER_PROCESSES, NOTHING, fp64=True)
    assert max(told.values()) <= 1e-12, told


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("more", [{}, {"experts": 3, "rank": 2}], ids=["matrices", "experts"])
def test_coordinates_are_summed_in_the_place_of_gradients(more, ranks, pool):
    """In fp64, where nothing but order is left. The expert that sees little has gradients of rank 5, or none: with a
    rank above it, rounding chooses further directions, and moves an ordinary run by 1e-3 as well."""
    told = compared(pool, ranks, REDUCED, COORDINATES, fp64=True, **more)
    assert len(told) >= 6
    assert max(told.values()) <= 1e-12, told


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_coordinates_in_fp32_are_summed_as_closely_as_it_can(ranks, pool):
    told = compared(pool, ranks, REDUCED, COORDINATES)
    assert max(told.values()) <= 1e-5, told


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_passes_overflows_and_parameters_that_are_not_used(ranks, pool):
    told = pool.call(ranks, "released_ddp_parts:passes", timeout=200)
    assert len(told) > 12
    assert max(told.values()) <= 1e-5, told
    without = pool.call(ranks, "released_ddp_parts:without_hooks", timeout=200)
    assert max(without) <= 1e-5, without


def test_reentrant_checkpoints(pool):
    """Whose own passes end before all gradients are there: one round of messages nonetheless."""
    told, said = pool.call(2, "released_ddp_parts:checkpointed")
    assert told[NOTHING][0] == 0.0
    assert told[COORDINATES][0] <= 1e-5
    assert told[COORDINATES][1] <= 4
    assert "came twice in one backward pass" in said


def test_a_norm_is_known_to_some_percent_and_exactly_where_gradients_are_whole(pool):
    found, clipped = pool.call(2, "released_ddp_parts:norms", timeout=200)
    for largest, of_whole in found:
        assert 1e-4 < largest < 0.1
        assert of_whole < 1e-5
    assert clipped < 0.02


def test_what_is_sent(pool):
    """Of matrices 96 x 96 with rank 8; what clipping reads is sent where it does, as one message."""
    told = pool.call(2, "released_ddp_parts:bytes_sent")
    (refresh, between), (steps, clipped) = told[COORDINATES]
    (dense, _), _ = told[None]
    assert dense <= refresh <= 1.001 * dense
    assert between <= 1.05 * 8 / 96 * dense
    assert len(steps) == 1
    assert len(clipped) == 2
    assert 4 / 8 <= clipped[1] / steps[0] <= 1.05 * 4 / 8


def test_after_a_pass_that_failed_the_next_step_is_right(pool):
    """Parameters that had moved on one process have moved on all."""
    told = pool.call(2, "released_ddp_parts:failures")
    assert told[COORDINATES] == 0.0
    assert 0 < told[NOTHING] < 0.1


@pytest.mark.thorough
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, pool):
    """Whose gradients are kept in another way."""
    pool.call(2, "released_ddp_parts:went_on", str(tmp_path), COORDINATES, 0, 5)
    pool.call(4, "released_ddp_parts:went_on", str(tmp_path), NOTHING, 5, 9)
    assert pool.call(2, "released_ddp_parts:went_on", str(tmp_path), COORDINATES, 9, 13) <= 1e-5


def test_after_remove_a_new_ddp_sums_all(pool):
    difference, said = pool.call(2, "released_ddp_parts:removed")
    assert difference <= 1e-5
    assert "build a new one of the same model" in said


def test_what_is_refused(pool):
    said = pool.call(2, "released_ddp_parts:refusals")
    expected = {
        "owned": "call keep_out_of_ddp(model, optimizer, keep='coordinates') before it is built",
        "too late": "keep_out_of_ddp comes before DistributedDataParallel is built",
        "whole": "this model does not sum their gradients",
        "for another": "call keep_out_of_ddp(model, optimizer, keep='nothing') before it is built",
        "not released": "call release_gradients(ddp, optimizer, keep='coordinates') before the first step",
        "disagreement": "release_gradients has passes=1 here and None on process 1",
        "fira": "give keep='nothing'",
        "no_sync": "give keep='coordinates', or one pass a step",
        "clipped": "freed in the backward pass",
        "scaled": "freed in the backward pass",
        "second pass": "freed in the backward pass",
        "compiled": "compile its layers",
    }
    assert said.keys() == expected.keys()
    for key, part in expected.items():
        assert part in said[key], said[key]


@pytest.mark.parametrize(
    ("keep", "passes", "clip"),
    [
        (NOTHING, 1, 0.0),
        pytest.param(COORDINATES, 2, 1.0, marks=pytest.mark.thorough),
        pytest.param(COORDINATES, 1, 0.0, marks=pytest.mark.thorough),
        pytest.param(COORDINATES, 1, 1.0, marks=pytest.mark.thorough),
    ],
)
def test_a_run_of_the_command_is_that_of_one_that_keeps_all_and_goes_on(
    keep, passes, clip, tiny, tmp_path, metrics, pool
):
    command = ["-m", "gracile.train.pretrain"]
    command.append(tiny(max_steps=8, gradient_accumulation_steps=passes, max_grad_norm=clip, save_steps=5))
    kept = ["--keep_gradients", keep, "--output_dir", str(tmp_path / "kept")]
    for more in ([], kept):
        done = pool.run(2, *command, *more)
        assert done.returncode == 0, done.stdout[-3000:]
    ordinary, freed = (metrics(tmp_path / run)["history"] for run in ("run", "kept"))
    if keep == NOTHING:
        assert [entry["loss"] for entry in freed if "loss" in entry] == [e["loss"] for e in ordinary if "loss" in e]
        assert same(weights(tmp_path / "kept"), weights(tmp_path / "run"))
    one, other = ([entry["grad_norm"] for entry in told if "grad_norm" in entry] for told in (ordinary, freed))
    assert other == pytest.approx(one, rel=1e-5 if keep == NOTHING else 0.06)
    for key, value in weights(tmp_path / "run").items():
        difference = torch.linalg.vector_norm(weights(tmp_path / "kept")[key] - value)
        assert difference <= (0.03 if clip else 1e-4) * torch.linalg.vector_norm(value), key
    again = pool.run(2, *command, *kept, "--resume_from_checkpoint", str(tmp_path / "kept" / "checkpoint-5"))
    assert again.returncode == 0, again.stdout[-3000:]
    assert metrics(tmp_path / "kept")["history"] == freed
