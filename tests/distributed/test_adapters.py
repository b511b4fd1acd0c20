"""Adapters split over processes. ``split_adapters.py`` runs there."""

import json
from pathlib import Path

import pytest

TERMS = str(Path(__file__).with_name("terms_in_trainer.py"))
FEW = [
    ("sorsa", "fsdp2"), ("pst", "zero2"), ("loraxs", "zero3"), ("balora", "ddp"), ("masktuning, gated", "ddp"),
    ("sorsa, own loss", "fsdp2"), ("balora, own loss", "zero2"),
]  # fmt: skip
METHODS = (
    "alignguard", "allora", "balora", "dsee", "intrinsicdimension", "lorasb", "loraxs", "masktuning", "pst", "soka",
    "sorsa", "spp", "svfit",
)  # fmt: skip
OWN = [
    (f"{name}, own loss", layout)
    for name in ("alignguard", "balora", "sorsa", "masktuning, gated")
    for layout in ("ddp", "fsdp2", "zero2", "zero3")
]
ALL = [(name, layout) for name in METHODS for layout in ("ddp", "fsdp2", "zero2", "zero3")]
REFUSED = {  # with the word that tells why
    ("allora", "zero2"): "DeepSpeed",
    ("allora", "zero3"): "DeepSpeed",
    ("alignguard, own loss", "zero3"): "stage3_param_persistence_threshold",
    ("sorsa, own loss", "zero3"): "stage3_param_persistence_threshold",
    ("masktuning, gated, own loss", "fsdp2"): "use DDP, or gradient_dropout=0",
    ("masktuning, gated, own loss", "zero2"): "use DDP, or gradient_dropout=0",
    ("masktuning, gated, own loss", "zero3"): "use DDP, or gradient_dropout=0",
    ("intrinsicdimension", "fsdp2"): "is shared with a parameter",  # by FSDP2, where blocks are wrapped one by one
}


def check(cells, told):
    for cell, found in zip(cells, told, strict=True):
        if cell in REFUSED:
            assert isinstance(found, str), cell
            assert REFUSED[cell] in found
        else:
            assert isinstance(found, float), (cell, found)
            assert found < 1e-3, (cell, found)


def test_an_adapter_split_over_two_processes_is_that_of_one(pool):
    check(FEW, pool.call(2, "split_adapters:measure", FEW, timeout=600))


@pytest.mark.thorough
def test_so_is_every_one_in_every_layout(pool):
    cells = [*ALL, *OWN]
    check(cells, pool.call(2, "split_adapters:measure", cells, timeout=900))


@pytest.mark.parametrize("engine", [[], pytest.param(["zero2"], marks=pytest.mark.thorough)], ids=["DDP", "ZeRO 2"])
def test_terms_are_in_a_trainers_loss_once_a_step(engine, pool, tmp_path):
    done = pool.run(2, TERMS, str(tmp_path / "told.json"), *engine)
    assert done.returncode == 0, done.stdout[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert len(told) == 6
    assert max(told.values()) < 1e-4, told
