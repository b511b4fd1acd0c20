"""``keep_gradients: nothing`` of the command: the run of ``all`` to the bit, planned, resumed, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from helpers import interrupt, same, weights

from gracile.optim import released
from gracile.optim.released import kept_bytes
from gracile.train.config.parser import load_config
from gracile.train.engines.division import Division
from gracile.train.measurement.kinds import BUFFERS, GRADIENTS, STEP
from gracile.train.measurement.planner import Planner
from gracile.train.pretrain import main
from gracile.train.profile import main as profile
from gracile.train.run import checkpoints

ZERO2 = str(Path(__file__).parents[2] / "configs" / "deepspeed" / "zero2.json")
ALONE = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    "optimizer", ["galore_adamw", "rigl_adamw", pytest.param("relora_adamw", marks=pytest.mark.thorough)]
)
def test_a_run_has_the_bits_of_one_that_keeps_all_and_goes_on_with_either(optimizer, tiny, tmp_path, metrics):
    more = {"relora_adamw": {"layer": "relora"}, "rigl_adamw": {"sparsity": 0.8}}.get(optimizer, {})
    config = tiny(optimizer=optimizer, **ALONE, **more)
    assert main([config]) == 0
    freed = ["--keep_gradients", "nothing"]
    assert main([config, *freed, "--output_dir", str(tmp_path / "freed")]) == 0
    one, other = metrics(tmp_path / "run"), metrics(tmp_path / "freed")
    assert other["history"] == one["history"]  # norms of gradients among it
    assert "grad_norm" in one["history"][1]
    assert same(weights(tmp_path / "freed"), weights(tmp_path / "run"))
    first = checkpoints.checkpoints(tmp_path / "run")[-1].name
    broken = interrupt(tmp_path / "run", tmp_path / "again", keep=first)
    assert main([config, *freed, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    assert metrics(broken)["history"] == one["history"]
    assert same(weights(broken), weights(tmp_path / "run"))


def test_a_run_that_clips_in_two_passes_is_that_of_one_that_keeps_all(tiny, tmp_path, metrics):
    """Dropout draws the same numbers, and logged are norms before clipping."""
    config = tiny(gradient_accumulation_steps=1, max_grad_norm=0.3, model_overrides={"attention_dropout": 0.1})
    freed = ["--keep_gradients", "nothing", "--clip_in_two_passes", "true", "--output_dir", str(tmp_path / "freed")]
    assert main([config]) == main([config, *freed]) == 0
    one, other = weights(tmp_path / "run"), weights(tmp_path / "freed")
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)
    histories = [metrics(tmp_path / run)["history"] for run in ("run", "freed")]
    norms = [[entry["grad_norm"] for entry in history if "grad_norm" in entry] for history in histories]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert min(norms[0]) > 0.3
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(("passes", "clip", "turns"), [(1, 0.0, None), (1, 0.3, 7), (2, 0.0, None)])
def test_a_run_that_keeps_coordinates_is_that_of_one_that_keeps_all(passes, clip, turns, tiny, tmp_path, metrics):
    """To the bit where nothing is added or scaled."""
    config = tiny(gradient_accumulation_steps=passes, max_grad_norm=clip, optimizer_args={"refreshes_at_once": turns})
    assert main([config]) == 0
    assert main([config, "--keep_gradients", "coordinates", "--output_dir", str(tmp_path / "kept")]) == 0
    one, other = weights(tmp_path / "run"), weights(tmp_path / "kept")
    if passes == 1 and not clip:
        assert same(one, other)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)
    histories = [metrics(tmp_path / run)["history"] for run in ("run", "kept")]
    norms = [[entry["grad_norm"] for entry in history if "grad_norm" in entry] for history in histories]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4 if passes == 1 else 0.06)
    assert len(norms[0]) > 2


def test_a_run_that_keeps_the_entries_of_masks_has_the_bits_of_one_that_keeps_all(tiny, tmp_path):
    wide = {"hidden_size": 96, "intermediate_size": 264, "num_hidden_layers": 2, "num_attention_heads": 2}
    keys = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "model_overrides": {**wide, "vocab_size": 400}}
    config = tiny(optimizer="set_adamw", sparsity=0.8, **keys)
    freed = ["--keep_gradients", "coordinates"]
    assert main([config]) == 0
    assert main([config, *freed, "--output_dir", str(tmp_path / "kept")]) == 0
    assert same(weights(tmp_path / "kept"), weights(tmp_path / "run"))
    planned = [Planner(load_config([config, *more])).plan("set_adamw", 2, False) for more in ([], freed)]
    assert planned[1].held[GRADIENTS] < planned[0].held[GRADIENTS]


def test_the_plan_has_the_largest_gradient_alone(tiny):
    plans = []
    for kept in ("all", "nothing", "coordinates"):
        config = load_config([tiny(**ALONE), "--keep_gradients", kept])
        planner = Planner(config)
        plans.append(planner.plan(config.optimizer.optimizer, 2, checkpointing=False))
        sizes = [p.numel() * 4 for p in planner._own_model.parameters()]
    assert plans[0].held[GRADIENTS] == sum(sizes)
    assert plans[1].held[GRADIENTS] == max(sizes)
    assert plans[1].at_peak[STEP] == plans[1].held[STEP] > 0
    reduced = planner.trainee.optimizer(planner._own_model, "galore_adamw")
    assert plans[2].held[GRADIENTS] == kept_bytes(reduced, "coordinates") + max(sizes) < sum(sizes)
    waits = Planner(load_config([tiny(gradient_accumulation_steps=2), "--keep_gradients", "coordinates"]))
    assert waits.plan("galore_adamw", 2, checkpointing=False).held[GRADIENTS] == sum(sizes)  # at a refresh
    turns = {"gradient_accumulation_steps": 2, "update_proj_gap": 10, "optimizer_args": {"refreshes_at_once": 2}}
    spread = Planner(load_config([tiny(**turns), "--keep_gradients", "coordinates"]))
    held = spread.plan("galore_adamw", 2, checkpointing=False).held[GRADIENTS]
    two = max(p.numel() * 4 for name, p in spread._own_model.named_parameters() if "mlp" in name)
    assert plans[2].held[GRADIENTS] < held <= plans[2].held[GRADIENTS] + 2 * two < sum(sizes)
    assert spread.plan("fira_adamw", 2, checkpointing=False).held[GRADIENTS] == sum(sizes)


def test_the_plan_has_no_buckets_of_what_ddp_leaves_out(tiny, monkeypatch):
    """But lots that are on their way."""
    monkeypatch.setattr(released, "LOT_BYTES", 1)
    buffers = {}
    for kept in ("all", "nothing", "coordinates"):
        config = load_config([tiny(**ALONE), "--keep_gradients", kept])
        planner = Planner(config, division=lambda *_: Division(processes=2))
        buffers[kept] = planner.plan(config.optimizer.optimizer, 2, checkpointing=False).held[BUFFERS]
    named = dict(planner._own_model.named_parameters())
    matrices = [p.nbytes for name, p in named.items() if "_proj" in name]
    sizes = [p.nbytes for p in named.values()]
    assert buffers["all"] == sum(sizes)
    assert buffers["nothing"] == min(sizes) + 2 * max(sizes)
    assert buffers["coordinates"] == sum(sizes) - sum(matrices) + 2 * max(matrices)


@pytest.mark.parametrize("kept", ["nothing", "coordinates"])
def test_what_is_planned_is_measured(kept, tiny, capsys):
    """Also where two passes clip. Of coordinates the plan is for the largest gradient when all others are there."""
    clips = {"max_grad_norm": 0.3, "clip_in_two_passes": True} if kept == "nothing" else {}
    config = tiny(keep_gradients=kept, update_proj_gap=50, **{**ALONE, **clips})
    assert profile([config, "--steps", "1", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{\n") :])
    for kind, planned in found["planned"].items():
        measured = found["measured"][kind]
        if kind == STEP:
            assert measured == pytest.approx(planned, abs=256) != 0, "norms among it"
        elif kind == GRADIENTS and kept == "coordinates":
            assert planned - 400 * 32 * 4 == measured > 0, "the embedding comes last"
        else:
            assert measured == pytest.approx(planned, abs=16), kind
    assert found["at_peak"]["measured"][GRADIENTS] <= found["at_peak"]["planned"][GRADIENTS]
    assert found["seconds"]["optimizer"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"max_grad_norm": 1.0},
            "max_grad_norm 1 clips by the norm of all; give --max_grad_norm 0, or --clip_in_two_passes true",
        ),
        ({"clip_in_two_passes": True}, "clip_in_two_passes needs max_grad_norm above 0, got 0"),
        (
            {"clip_in_two_passes": True, "keep_gradients": "coordinates", "max_grad_norm": 1.0},
            "clip_in_two_passes is for keep_gradients: nothing, got coordinates, which clips in one pass; leave it out",
        ),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 2 adds up several passes"),
        ({"optimizer": "adamw"}, "which adamw cannot; choose an optimizer of gracile"),
        ({"deepspeed": ZERO2}, "DeepSpeed owns them; use DistributedDataParallel or FSDP2, or one process"),
        ({"keep_gradients": "some"}, "keep_gradients must be one of all, coordinates, nothing, got 'some'"),
        (
            {"keep_gradients": "coordinates", "optimizer": "fira_adamw"},
            "fira_adamw needs more of them than coordinates; give --keep_gradients nothing",
        ),
    ],
)
def test_what_wants_all_gradients_is_refused(changes, said, tiny, tmp_path, capsys):
    assert main([tiny(**{"keep_gradients": "nothing", **ALONE, **changes})]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
