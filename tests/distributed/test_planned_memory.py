"""What ``gracile memory`` plans for a process of ZeRO is what ``gracile profile`` measures in one of two."""

import json
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("zero1", {"layer": "sltrain", "optimizer": "sltrain_adamw"}),
        ("zero2", {"bf16": True, "optimizer": "ldadamw", "target_modules": ["mlp"]}),
        ("zero3", {"bf16": True, "model": "2m", "model_overrides": None}),
        ("zero3_offload", {"layer": "sst", "optimizer": "sst_adamw"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_plan_is_what_is_measured(name, keys, tiny, pool):
    config = tiny(gradient_accumulation_steps=1, **keys)
    command = ["-m", "gracile.train.profile", config, "--steps", "1", "--json"]
    done = pool.run(2, *command, "--deepspeed", str(CONFIGS / f"{name}.json"))
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(done.stdout[done.stdout.index('{\n  "model"') : done.stdout.rindex("\n}") + 2])
    step, engine = found["planned"].pop("optimizer's step"), 4 * found["planned"]["master weights"]
    assert 0 < step <= found["measured"]["optimizer's step"] <= step + engine, "which copies gradients in its own step"
    for kind, planned in found["planned"].items():
        share = 0.1 if kind in ("activations", "temporary") else 0.02
        assert found["measured"][kind] == pytest.approx(planned, rel=share), (kind, found)
    assert found["measured"]["master weights"] > 0 < found["measured"]["moments"]
