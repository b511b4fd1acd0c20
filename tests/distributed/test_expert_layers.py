"""Mixtures whose experts are layers, split over processes. ``expert_layers.py`` runs there."""

import pytest

FEW = [("mixtral", "sltrain", "zero3", "checkpointed"), ("gpt_oss", "sst", "fsdp2")]
ALL = [
    (kind, method, layout)
    for kind, method in (("mixtral", "nm"), ("qwen3_moe", "sst"), ("deepseek_v3", "sltrain"), ("gpt_oss", "relora"))
    for layout in ("fsdp2", "zero1", "zero2", "zero3")
]
ALL += [("mixtral", "maestro", "fsdp2", "checkpointed"), ("gpt_oss", "maestro", "zero3")]


def test_experts_as_layers_train_split_over_two_processes_as_in_one(pool):
    told = pool.call(2, "expert_layers:measure", FEW, timeout=600)
    assert max(told) < 1e-4, dict(zip(FEW, told, strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("ranks", [2, 4])
def test_so_does_each_in_every_layout(pool, ranks):
    told = pool.call(ranks, "expert_layers:measure", ALL, timeout=900)
    assert max(told) < 3e-4, dict(zip(ALL, told, strict=True))
