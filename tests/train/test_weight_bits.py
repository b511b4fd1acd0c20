"""``weight_bits: 8`` of the command: a run, its checkpoints and its end, its plan to the byte, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from helpers import interrupt, same, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gracile.models.int8 import dequantize_weights
from gracile.train.build import model as building
from gracile.train.config.parser import load_config
from gracile.train.measurement.kinds import WEIGHTS
from gracile.train.measurement.planner import Planner
from gracile.train.pretrain import main
from gracile.train.profile import main as profile
from gracile.train.run import checkpoints

ZERO2 = str(Path(__file__).parents[2] / "configs" / "deepspeed" / "zero2.json")
IN_8_BITS = {"weight_bits": 8, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    "freed",
    [
        pytest.param({}, id="kept"),
        pytest.param({"keep_gradients": "nothing", "max_grad_norm": 0.0}, id="freed", marks=pytest.mark.thorough),
    ],
)
def test_a_run_resumes_to_the_bit_and_ends_as_an_ordinary_model(freed, tiny, tmp_path, metrics):
    config = tiny(**IN_8_BITS, **freed)
    assert main([config]) == 0
    first, last = checkpoints.checkpoints(tmp_path / "run")[-1], checkpoints.checkpoints(tmp_path / "run")[0]
    held = load_file(last / "model.safetensors")
    codes = [value for key, value in held.items() if key.endswith("weight_codes")]
    assert {value.dtype for value in codes} == {torch.int8}
    assert len(codes) == 2 * 7 + 2  # embedding and output among them
    broken = interrupt(tmp_path / "run", tmp_path / "again", keep=first.name)
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    assert metrics(broken)["history"] == metrics(tmp_path / "run")["history"]
    assert same(weights(broken), weights(tmp_path / "run"))
    assert same(load_file(broken / last.name / "model.safetensors"), held)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    opened = building.build_model(load_config([config]), last)
    dequantize_weights(opened)
    assert last.name == "checkpoint-12"
    assert same(opened.state_dict(), final.state_dict())


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        ("galore_adamw_8bit", "bfloat16"),
        *(
            pytest.param(optimizer, dtype, marks=pytest.mark.thorough)
            for optimizer in ("galore_adamw", "apollo_adamw", "galore_adamw_8bit")
            for dtype in ("float32", "bfloat16")
        ),
    ],
)
def test_the_plan_is_what_is_measured(optimizer, dtype, tiny, capsys):
    config = tiny(model_overrides=None, optimizer=optimizer, dtype=dtype, block_size=64, **IN_8_BITS)
    assert profile([config, "--steps", "1", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{\n") :])
    for kind, planned in found["planned"].items():
        measured = found["measured"][kind]
        if kind in ("activations", "temporary"):
            assert measured == pytest.approx(planned, rel=0.1) != 0, kind
        elif kind == "optimizer's step":
            assert measured == pytest.approx(planned, abs=64)
        else:
            assert measured == planned, kind


def test_planned_beside_an_optimizer_that_does_not_move_them(tiny):
    planner = Planner(load_config([tiny(**IN_8_BITS)]))
    ours, torchs = (planner.plan(name, 2, checkpointing=False).held[WEIGHTS] for name in ("galore_adamw", "adamw"))
    matrices = sum(p.numel() for p in planner._own_model.parameters() if p.dim() == 2)
    scales = sum(4 * len(p) for p in planner._own_model.parameters() if p.dim() == 2)
    assert torchs - ours == 3 * matrices - scales


def test_rounded_to_nearest_where_that_is_asked_for(tiny):
    config = load_config([tiny(**IN_8_BITS), "--optimizer_args", '{"stochastic_rounding": false}'])
    for chosen, wanted in ((config, False), (load_config([tiny(**IN_8_BITS)]), True)):
        built = building.build_model(chosen, None)
        optimizer = Planner(chosen).trainee.optimizer(built, "galore_adamw")
        assert {group["stochastic_rounding"] for group in optimizer.param_groups} == {wanted}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_bits": 4}, "weight_bits must be 8, or left out for weights in dtype, got 4"),
        ({"weight_bits": 8, "weight_group_size": 0}, "weight_group_size must be at least 1, got 0"),
        ({"weight_group_size": 64}, "weight_group_size needs weight_bits: 8; leave it out"),
        ({"weight_bits": 8, "layer": "relora", "optimizer": "relora_adamw"}, "weight_bits: 8 is for ordinary layers"),
        ({"weight_bits": 8, "optimizer": "adamw"}, "weight_bits: 8 cannot be moved by optimizer adamw; choose one of"),
        ({"weight_bits": 8, "optimizer": "rigl_adamw", "sparsity": 0.5}, "cannot be moved by optimizer rigl_adamw"),
        ({"weight_bits": 8, "deepspeed": ZERO2}, "weight_bits: 8 is for one process or DistributedDataParallel"),
    ],
)
def test_refused_in_one_line(given, message, tiny, capsys):
    assert main([tiny(**given)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gracile pretrain: ")
    assert message in err
    assert err.count("\n") == 1
