"""Gradients freed in backward under FSDP2: the bits of an ordinary step, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from catalogue import OVER_PROCESSES, VARIANTS
from helpers import same, weights

from gracile.optim.sparse.optimizer import SparseOptimizer

DEFERRED = "gradients are summed in a later pass"  # as fsdp_on_cpu.py says it
ALWAYS = ("GaLoreAdamW", "RigLAdamW", "FiraAdamW", "HyperSparseAdamW")
WHOLE = [name for name in OVER_PROCESSES if not VARIANTS[name].layer]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_some_classes_move_as_by_an_ordinary_step(ranks, pool):
    told = pool.call(ranks, "released_parts:compare", [{"optimizer": name} for name in ALWAYS], timeout=200)
    assert len(told) == len(ALWAYS)
    assert not any(told.values()), told


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "experts"), [(name, experts) for name in WHOLE for experts in (0, 3) if not (experts and "SCALE" in name)]
)
def test_each_class_moves_as_by_an_ordinary_step(name, experts, pool):
    told = pool.call(2, "released_parts:compare", [{"optimizer": name, "experts": experts}], timeout=200)
    assert not any(told.values()), told


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_rows_of_a_matrix_move_by_the_coordinates_that_were_kept(ranks, pool):
    """On the right and on the left, where columns are exchanged in each pass; or by entries of masks, to the bit. In
    fp64, where nothing but order is left."""
    kinds = [name for name in WHOLE if VARIANTS[name].cls.keeps_coordinates and name != "SparseAdamW"]
    assert len(kinds) == 11
    names = kinds[::2] if ranks == 4 else ["GaLoreAdamW", "SETAdamW"]
    told = pool.call(ranks, "released_parts:kept", [{"optimizer": name, "fp64": True} for name in names], timeout=200)
    for name, found in told.items():
        (one, norm, count), (waiting, same_norm, some), (several, sketched, as_many) = found
        masked = issubclass(VARIANTS[name].cls, SparseOptimizer)
        assert max(one, waiting, several) <= (0 if masked else 1e-12), name
        assert max(norm, same_norm) < 1e-12, name
        assert 0 < sketched < 0.1, name
        assert count == some == as_many > 2, name


def test_what_is_refused(pool):
    of_whole, clipped, again = pool.call(2, "released_parts:refusals", timeout=200)
    assert "call it after fully_shard" in of_whole
    assert "freed in the backward pass" in clipped
    assert "one pass a step" in again or "several passes a step" in again


def under_fsdp(pool, config, *more, ends_with=0):
    command = [str(Path(__file__).with_name("fsdp_on_cpu.py")), config, "--fsdp", "--fsdp_config"]
    command.append(json.dumps({"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}))
    done = pool.run(2, *command, *more)
    assert done.returncode == ends_with, done.stdout[-3000:]
    return done.stdout


@pytest.mark.thorough
def test_a_run_under_fsdp_has_the_bits_of_one_that_keeps_all(tiny, tmp_path, metrics, pool):
    config = tiny(max_steps=8, gradient_accumulation_steps=1, max_grad_norm=0.0)
    for more in ([], ["--keep_gradients", "nothing", "--output_dir", str(tmp_path / "freed")]):
        under_fsdp(pool, config, *more)
    assert metrics(tmp_path / "freed")["history"] == metrics(tmp_path / "run")["history"]
    assert same(weights(tmp_path / "freed"), weights(tmp_path / "run"))


@pytest.mark.parametrize(
    ("passes", "clip", "optimizer"),
    [
        (2, 0.0, {}),
        pytest.param(1, 1.0, {}, marks=pytest.mark.thorough),
        pytest.param(2, 0.0, {"optimizer": "rigl_adamw", "rank": None, "sparsity": 0.8}, marks=pytest.mark.thorough),
    ],
)
def test_a_run_under_fsdp_by_coordinates_goes_on(passes, clip, optimizer, tiny, tmp_path, metrics, pool):
    """To rounding the run that keeps all, of which no pass waits for a later one to sum its gradients."""
    config = tiny(max_steps=8, gradient_accumulation_steps=passes, max_grad_norm=clip, save_steps=5, **optimizer)
    kept = ["--keep_gradients", "coordinates", "--output_dir", str(tmp_path / "kept")]
    assert (DEFERRED in under_fsdp(pool, config)) == (passes > 1)
    assert DEFERRED not in under_fsdp(pool, config, *kept)
    one, other = (metrics(tmp_path / run)["history"] for run in ("run", "kept"))
    norms = [[entry["grad_norm"] for entry in told if "grad_norm" in entry] for told in (one, other)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5 if passes == 1 else 0.15)
    for key, value in weights(tmp_path / "run").items():
        difference = torch.linalg.vector_norm(weights(tmp_path / "kept")[key] - value)
        assert difference <= 1e-4 * torch.linalg.vector_norm(value), key
    under_fsdp(pool, config, *kept, "--resume_from_checkpoint", str(tmp_path / "kept" / "checkpoint-5"))
    assert metrics(tmp_path / "kept")["history"] == other


def test_a_sum_that_waits_for_the_last_pass_is_refused_of_coordinates(tiny, pool):
    waits = json.dumps({"gradient_accumulation_kwargs": {"sync_each_batch": False}})
    said = under_fsdp(pool, tiny(), "--keep_gradients", "coordinates", "--accelerator_config", waits, ends_with=2)
    assert "sync_each_batch is false; leave it out" in said
