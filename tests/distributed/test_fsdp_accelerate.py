"""accelerate splits a model (FSDP2) after its optimizer was built, and swaps the parameters in its groups."""

import pytest


@pytest.fixture(scope="module")
def told(pool, tmp_path_factory):
    return pool.call(2, "fsdp_accelerate:measure", str(tmp_path_factory.mktemp("accelerate") / "state"), timeout=600)


@pytest.mark.parametrize("form", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_prepare_save_state_and_load_state(told, form):
    assert told[form]["difference"] <= 1e-5
    assert told[form]["same_bits"]


def test_no_process_keeps_the_whole_parameters(told):
    """The optimizer was built with them; held any longer, they would take what splitting saves."""
    assert told["originals_left"] == 0


@pytest.mark.parametrize("way", ["in_its_list", "in_a_new_list"])
def test_parameters_swapped_by_hand_are_found_by_their_place(told, way):
    assert told[way] <= 1e-5


def test_swaps_that_cannot_be_followed_are_refused(told):
    assert "(45, 24), (28, 45)] were replaced by DTensors of shapes [(28, 45), (45, 24)]" in told["in_another_order"]
    assert "had state already" in told["with_state"]
