"""Selections split over processes: the masks and values of one process. ``split_selections.py`` runs there."""

import pytest
import torch
from selected_models import llama

from gracile.selections import merge_delta

FEW = [
    ("sara", "zero3"),
    ("s2ft", "fsdp2"),
    ("s2ft", "zero2"),
    ("sara", "zero1"),
    ("hft", "fsdp2"),
    ("hft", "zero3"),
    ("s2ft", "zero redundancy"),
]
LAYOUTS = ("ddp", "zero redundancy", "fsdp2", "zero1", "zero2", "zero3", "zero3 split first")
ALL = [(name, layout) for name in ("hft", "s2ft", "sara") for layout in LAYOUTS]


def check(cells, told):
    for cell, (same, gap, held) in zip(cells, told, strict=True):
        assert same, f"{cell}: other weights moved than in one process"
        assert gap < 1e-4, cell
        assert held == (2.0 if cell[1] == "ddp" else 1.0), f"{cell}: {held} times the moments of one process"


def test_a_selection_split_over_two_processes_is_that_of_one(pool):
    check(FEW, pool.call(2, "split_selections:measure", FEW, timeout=600))


@pytest.mark.thorough
def test_so_is_every_one_in_every_layout(pool):
    check(ALL, pool.call(2, "split_selections:measure", ALL, timeout=900))


def test_a_delta_of_a_split_model_is_that_of_the_whole(pool, tmp_path):
    whole = pool.call(2, "split_selections:saved", str(tmp_path), timeout=300)
    model = llama(2)
    merge_delta(model, tmp_path)
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters())
