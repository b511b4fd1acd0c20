"""Gradients freed in backward under FSDP2: the bits of an ordinary step, and what is refused."""

import json
from pathlib import Path

import pytest
from catalogue import OVER_PROCESSES, VARIANTS
from helpers import same, weights

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
    """On the right and on the left, where columns are exchanged in each pass."""
    kinds = [
        name for name in WHOLE if VARIANTS[name].cls.keeps_coordinates_split and VARIANTS[name].cls.keeps_coordinates
    ]
    assert len(kinds) == 6
    names = kinds[::2] if ranks == 4 else ["GaLoreAdamW"]
    told = pool.call(ranks, "released_parts:kept", [{"optimizer": name} for name in names], timeout=200)
    for name, found in told.items():
        (one, norm, count), (waiting, same_norm, some), (several, sketched, as_many) = found
        assert max(one, waiting, several) < 1e-5, name
        assert max(norm, same_norm) < 1e-5, name
        assert 0 < sketched < 0.1, name
        assert count == some == as_many > 2, name


def test_what_is_refused(pool):
    of_whole, of_masks, clipped, again = pool.call(2, "released_parts:refusals", timeout=200)
    assert "call it after fully_shard" in of_whole
    assert "entries of masks are kept of whole gradients, which FSDP2 has split" in of_masks
    assert "freed in the backward pass" in clipped
    assert "one pass a step" in again or "several passes a step" in again


@pytest.mark.thorough
def test_a_run_under_fsdp_has_the_bits_of_one_that_keeps_all(tiny, tmp_path, metrics, pool):
    config = tiny(max_steps=8, gradient_accumulation_steps=1, max_grad_norm=0.0)
    command = [str(Path(__file__).with_name("fsdp_on_cpu.py")), config, "--fsdp", "--fsdp_config"]
    command.append(json.dumps({"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}))
    for more in ([], ["--keep_gradients", "nothing", "--output_dir", str(tmp_path / "freed")]):
        done = pool.run(2, *command, *more)
        assert done.returncode == 0, done.stdout[-3000:]
    assert metrics(tmp_path / "freed")["history"] == metrics(tmp_path / "run")["history"]
    assert same(weights(tmp_path / "freed"), weights(tmp_path / "run"))
