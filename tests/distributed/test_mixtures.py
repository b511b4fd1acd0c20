"""Mixtures of experts as transformers builds them, split over processes. ``split_mixtures.py`` runs there."""

import pytest
from mixtures import MIXTURES

FEW = [("mixtral", "zero2"), ("gpt_oss", "fsdp2"), ("deepseek_v3", "zero3"), ("qwen3_moe", "zero1")]
ALL = [(kind, layout) for kind in MIXTURES for layout in ("fsdp2", "zero1", "zero2", "zero3")]


def test_a_mixture_split_over_two_processes_is_that_of_one(pool):
    told = pool.call(2, "split_mixtures:measure", FEW, timeout=600)
    assert max(told) < 1e-4, dict(zip(FEW, told, strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("ranks", [2, 4])
def test_so_is_each_in_every_layout(pool, ranks):
    told = pool.call(ranks, "split_mixtures:measure", ALL, timeout=900)
    assert max(told) < 1e-4, dict(zip(ALL, told, strict=True))
