"""FSDP2 runs saved by torch.distributed.checkpoint on four processes go on on four, and on two."""

import pytest

CELLS = [
    {"optimizer": "GaLoreAdamW", "proj_type": "left", "keys": {"shard_basis": True}},
    {"optimizer": "GaLoreAdamW8bit", "proj_type": "reverse_std"},
    {"optimizer": "GaLoreAdamW8bit Q-GaLore"},
    {"optimizer": "GaLoreAdafactor", "proj_type": "left"},
    {"optimizer": "GaLorePlusAdamW", "proj_type": "left"},
    {"optimizer": "DCTAdamW fed back"},
    {"optimizer": "APOLLOAdamW svd"},
    {"optimizer": "LDAdamW", "proj_type": "reverse_std"},
    {"optimizer": "SRigLAdamW"},
    {"optimizer": "GaLoreAdamW", "experts": 3, "rank": 3},
    {"optimizer": "GaLoreAdamW8bit Q-GaLore", "experts": 3, "rank": 3, "proj_type": "left"},
]
# The same state as that of a class above, or less: test_engine_checkpoints.py has every class.
THOROUGH = [
    {"optimizer": "Lion"},
    {"optimizer": "GaLoreAdamW"},
    {"optimizer": "GaLoreLion", "proj_type": "right"},
    {"optimizer": "FiraAdamW"},
    {"optimizer": "GradNormLoRPAdamW"},
    {"optimizer": "DCTAdamW", "proj_type": "left"},
    {"optimizer": "APOLLOAdamW", "proj_type": "left"},
    {"optimizer": "RigLAdamW"},
    {"optimizer": "SparseAdamW"},
    {"optimizer": "SCALE"},
]
LARGE = {"large": True}


def names(cells):
    return [" ".join(map(str, cell.values())) for cell in cells]


by_cell = pytest.mark.parametrize("number", range(len(CELLS)), ids=names(CELLS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def saved(pool, folder):
    return pool.call(4, "fsdp_checkpoints:measure", [*CELLS, LARGE], str(folder), "save", timeout=600)


@pytest.fixture(scope="module")
def loaded(pool, folder, saved):
    return pool.call(2, "fsdp_checkpoints:measure", [*CELLS, LARGE], str(folder), "load", timeout=600)


@pytest.fixture(scope="module")
def thoroughly(pool, tmp_path_factory):
    arguments = THOROUGH, str(tmp_path_factory.mktemp("thorough"))
    saved = pool.call(4, "fsdp_checkpoints:measure", *arguments, "save", timeout=600)
    return saved, pool.call(2, "fsdp_checkpoints:measure", *arguments, "load", timeout=600)


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(len(THOROUGH)), ids=names(THOROUGH))
def test_so_does_a_class_whose_state_is_like_that_of_another(thoroughly, number):
    saved, loaded = thoroughly
    assert_goes_on(saved[number])
    assert_is_the_run_of_one(loaded[number])


@by_cell
def test_on_as_many_processes_it_goes_on_to_the_same_bits(saved, number):
    """Weights and state, which stays plain tensors; and state made before the first step leaves no trace in the run."""
    assert_goes_on(saved[number])


@by_cell
def test_on_half_as_many_processes_it_is_the_run_of_one(loaded, number):
    assert_is_the_run_of_one(loaded[number])


def assert_goes_on(result):
    assert result["same_bits"]
    assert result["plain"]
    assert_is_the_run_of_one(result)


def assert_is_the_run_of_one(result):
    assert result["kept"] == 0
    assert result["difference"] <= 1e-5, result
    assert result["of_movement"] <= 1e-4, result


def test_moments_in_8_bits_are_saved_in_fp32_and_rounded_again(saved, loaded):
    """Also where the last process's part is too small for them."""
    for result in (saved[-1], loaded[-1]):
        assert 0 < result["kept"] < 0.01, result
