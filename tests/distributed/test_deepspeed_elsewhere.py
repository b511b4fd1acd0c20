"""A checkpoint of DeepSpeed goes on in another stage on another number of processes, as docs/checkpoints.md has it."""

import pytest
import torch

LAYOUTS = {("zero3", "zero2"): "GaLoreAdamW", ("zero2", "zero3"): "RigLAdamW"}


@pytest.fixture(scope="module", params=LAYOUTS, ids=" to ".join)
def runs(request, pool, tmp_path_factory):
    """The run on two processes, what the converter says, and the run that goes on on one."""
    first, second = request.param
    folder = str(tmp_path_factory.mktemp(first))
    cell = {"optimizer": LAYOUTS[request.param], "layout": first}
    weights, told = pool.call(2, "deepspeed_elsewhere:save", cell, folder)
    return weights, told, pool.call(1, "deepspeed_elsewhere:load", {**cell, "layout": second}, folder)


def test_full_state_is_the_way_between_numbers_of_processes(runs):
    weights, _, elsewhere = runs
    assert weights.keys() == elsewhere.keys()
    for name, value in weights.items():
        gap = torch.linalg.vector_norm(value - elsewhere[name])
        assert gap <= 1e-5 * torch.linalg.vector_norm(value), name


def test_the_converter_fails_as_the_page_says_and_the_file_says_why(runs):
    error, about = runs[1]
    assert error == "KeyError('exp_avg')"
    assert "save gracile.optim.full_state; DeepSpeed's ds_to_universal cannot convert them" in about
