"""Scripts written for torch.optim.AdamW and the transformers Trainer, with one line changed for each optimizer."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gracile import optim

SCRIPTS = Path(__file__).parent / "scripts"
MARK = "# the line to change"
RANKED = {"rank": 4, "update_proj_gap": 3}
MASKED = {"lr": 0.01, "update_every": 3, "t_end": 7}
FIXED_LR = {"lr": 0.01, "relative_step": False, "scale_parameter": False}

# Keys of the constructor, keys of the matrices.
CLASSES = {
    "APOLLOAdamW": ({"lr": 0.01}, RANKED),
    "DCTAdamW": ({"lr": 0.01}, RANKED),
    "FiraAdamW": ({"lr": 0.01}, RANKED),
    "GaLoreAdafactor": (FIXED_LR, RANKED),
    "GaLoreAdamW": ({"lr": 0.01}, RANKED),
    "GaLoreAdamW8bit": ({"lr": 0.01}, RANKED | {"quant": True, "cos_threshold": 0.4, "queue_size": 1}),
    "GaLoreLion": ({"lr": 0.005}, RANKED),
    "GaLorePlusAdamW": ({"lr": 0.01}, RANKED | {"num_heads": 2, "residual_warmup": 2}),
    "GradNormLoRPAdamW": ({"lr": 0.01}, RANKED),
    "LDAdamW": ({"lr": 0.01}, {"rank": 4}),
    "Lion": ({"lr": 0.005}, {}),
    "SCALE": ({"lr": 0.01}, {"role": "linear"}),
    "BlockSparseAdamW": (MASKED, {"sparsity": 0.5, "block_size": 1}),
    "HyperSparseAdamW": ({"lr": 0.01, "prune_at": 6}, {"sparsity": 0.5}),
    "RigLAdamW": (MASKED, {"sparsity": 0.5}),
    "SETAdamW": (MASKED, {"sparsity": 0.5}),
    "SRigLAdamW": (MASKED, {"sparsity": 0.5}),
    "SparseAdamW": (MASKED, {"density": 0.5, "grow": "momentum"}),
    "WGSEFAdamW": ({"lr": 0.01, "finish_at": 6}, {"keep": 0.5}),
}

# Those that need layers of their own: the layer's class and keys beside the optimizer's, and, where the groups of the
# Trainer will not do, those of the matrices.
LAYERED = {
    "ReLoRAAdamW": ("ReLoRALinear", {"rank": 8}, {"lr": 0.02, "merge_every": 3}),
    "SLTrainAdamW": ("SparseLowRankLinear", {"rank": 8, "density": 0.1}, {"lr": 0.01}),
    "SLTrainAdamW8bit": ("SparseLowRankLinear", {"rank": 8, "density": 0.1}, {"lr": 0.01}),
    "SSTAdamW": ("SpectralLinear", {"rank": 8}, {"lr": 0.01, "swap_every": 3, "iterations": 2}),
    "SRSTEAdamW": ("NMLinear", {"n": 2, "m": 4}, {"lr": 0.01, "n": None}),
    "CastAdamS": ("ScaledLinear", {"n": 2, "m": 4}, {"lr": 0.01, "n": None, "total_steps": 8}, {"n": 2, "m": 4}),
}

by_class = pytest.mark.parametrize("name", CLASSES)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rewritten(script, line, folder):
    """A copy of a script whose marked line is ``line``; nothing else differs."""
    source = (SCRIPTS / script).read_text(encoding="utf-8").splitlines()
    (number,) = (i for i, text in enumerate(source) if text.endswith(MARK))
    changed = [*source[:number], line, *source[number + 1 :]]
    assert [i for i, pair in enumerate(zip(source, changed, strict=True)) if len(set(pair)) == 2] == [number]
    path = folder / script
    path.write_text("\n".join(changed) + "\n", encoding="utf-8")
    return path


def run(path, *arguments):
    """The trainer of a script, run in this process, and the loss of each step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        trainer = runpy.run_path(str(path), run_name="__main__")["trainer"]
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_trained(trainer, losses, name, steps):
    assert type(trainer.optimizer.optimizer) is getattr(optim, name)
    assert trainer.state.global_step == len(losses) == steps
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {steps}


def test_the_table_has_every_class_of_the_package():
    every = {name: getattr(optim, name) for name in optim.__all__}
    classes = {n for n, kind in every.items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)}
    assert {*CLASSES, *LAYERED} == classes


# ---- an optimizer that the script builds ----------------------------------------------------------------------------


def line_with_groups(name):
    keys, ranked = CLASSES[name]
    groups = f"g.param_groups(model, target_modules='all-linear', **{ranked})"
    return f"import gracile.optim as g; optimizer = g.{name}({groups}, **{keys})"


@by_class
def test_a_classifier_trains_with_an_optimizer_on_groups_with_a_rank(name, tmp_path):
    path = rewritten("trainer_classification.py", line_with_groups(name), tmp_path)
    trainer, losses = run(path, tmp_path / "out")
    assert_trained(trainer, losses, name, steps=10)
    assert trainer.optimizer.param_groups[0].get("rank") == CLASSES[name][1].get("rank")


def test_a_changed_script_runs_alone(tmp_path):
    """As its own process, where it prints what it gives here."""
    path = rewritten("trainer_classification.py", line_with_groups("GaLoreAdamW"), tmp_path)
    _, losses = run(path, tmp_path / "here")
    command = [sys.executable, str(path), str(tmp_path / "there")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(losses, rel=1e-5)


# ---- an optimizer that the Trainer builds ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def losses_of_torch(tmp_path_factory):
    """Of the script as it is."""
    trainer, losses = run(SCRIPTS / "trainer_causal_lm.py", tmp_path_factory.mktemp("unchanged"))
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    return losses


@by_class
def test_a_language_model_trains_on_the_groups_of_the_trainer(name, tmp_path):
    """They mix matrices and vectors and have no rank: every class takes its plain rule, and saves no memory."""
    keys, _ = CLASSES[name]
    line = f"import gracile.optim; OPTIMIZER = gracile.optim.{name}, {keys}"
    path = rewritten("trainer_causal_lm.py", line, tmp_path)
    trainer, losses = run(path, tmp_path / "out")
    assert_trained(trainer, losses, name, steps=8)
    moments = {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_absmax", "exp_avg_sq_absmax"}
    for state in trainer.optimizer.state.values():
        assert set(state) <= {"step", *moments}


@pytest.mark.parametrize("name", [name for name in CLASSES if "AdamW" in name])
def test_the_plain_rule_of_the_adamw_classes_is_adamw(name, tmp_path, losses_of_torch):
    """Against the unchanged script. Two classes have torch's own; GaLore's eps and 8-bit moments are seen."""
    keys = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    path = rewritten(
        "trainer_causal_lm.py", f"import gracile.optim; OPTIMIZER = gracile.optim.{name}, {keys}", tmp_path
    )
    _, losses = run(path, tmp_path / "out")
    assert losses == pytest.approx(losses_of_torch, rel=1e-5 if name in ("DCTAdamW", "LDAdamW") else 1e-3)


@by_class
def test_a_language_model_with_ranks_resumes_from_the_checkpoint_of_the_trainer(name, tmp_path):
    """The Trainer takes groups from the key ``params`` of the keyword arguments instead of its own."""
    keys, ranked = CLASSES[name]
    groups = f"gracile.optim.param_groups(model, **{ranked})"
    line = f"import gracile.optim; OPTIMIZER = gracile.optim.{name}, {{'params': {groups}, **{keys}}}"
    path = rewritten("trainer_causal_lm.py", line, tmp_path)
    trainer, losses = run(path, tmp_path / "out")
    assert_trained(trainer, losses, name, steps=8)
    assert trainer.optimizer.param_groups[0].get("rank") == ranked.get("rank")
    resumed, again = run(path, tmp_path / "again", tmp_path / "out" / "checkpoint-5")
    assert again == losses
    for p, q in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", LAYERED)
def test_a_language_model_with_layers_trains_on_the_groups_of_the_trainer_and_resumes(name, tmp_path):
    """Which has factors of all shapes among its weights."""
    layer, layer_keys, keys, *ranked = LAYERED[name]
    groups = [f"'params': gracile.optim.param_groups(model, **{own}), " for own in ranked]
    line = "import gracile.optim; from gracile.models import layers; from gracile.models.convert import convert; "
    line += f"convert(model, layers.{layer}, **{layer_keys}); "
    line += f"OPTIMIZER = gracile.optim.{name}, {{{''.join(groups)}**{keys}}}"
    path = rewritten("trainer_causal_lm.py", line, tmp_path)
    trainer, losses = run(path, tmp_path / "out")
    assert_trained(trainer, losses, name, steps=8)
    resumed, again = run(path, tmp_path / "again", tmp_path / "out" / "checkpoint-5")
    assert again == losses
    for p, q in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
