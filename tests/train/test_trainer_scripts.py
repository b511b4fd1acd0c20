"""Scripts written for torch.optim.AdamW and the transformers Trainer, with one line changed for each optimizer."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from catalogue import VARIANTS, one_of_each_state

from gracile import optim

SCRIPTS = Path(__file__).parent / "scripts"
MARK = "# the line to change"
# Keys of the constructor, keys of the matrices.
CLASSES = {
    variant.cls.__name__: (variant.script.keys, variant.script.matrices)
    for variant in VARIANTS.values()
    if variant.script and not variant.layer
}
# Those that need layers of their own: the layer's class and keys beside the optimizer's, and, where the groups of the
# Trainer will not do, those of the matrices.
LAYERED = {
    variant.cls.__name__: (variant.layer.cls.__name__, variant.layer.script_keys, *filter(None, variant.script))
    for variant in VARIANTS.values()
    if variant.script and variant.layer
}

by_class = pytest.mark.parametrize("name", CLASSES)
# One class of each kind of state goes on from the Trainer's checkpoint; so do the others in the thorough part.
SCRIPTED = [name for name, variant in VARIANTS.items() if variant.script]
RESUMED = {VARIANTS[name].cls.__name__ for name in one_of_each_state(SCRIPTED)} | {"CastAdamS", "SSTAdamW"}


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(losses, rel=1e-5)


# ---- an optimizer that the Trainer builds ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def losses_of_torch(tmp_path_factory):
    """Of the script as it is."""
    trainer, losses = run(SCRIPTS / "trainer_causal_lm.py", tmp_path_factory.mktemp("unchanged"))
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    return losses


@by_class
def test_a_language_model_trains_on_the_groups_of_the_trainer(name, tmp_path, losses_of_torch):
    """They mix matrices and vectors and have no rank: every class takes its plain rule, and saves no memory. That of
    the AdamW classes is AdamW; DCTAdamW and LDAdamW have torch's own, and GaLore's eps and 8-bit moments are seen."""
    of_adamw = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8} if "AdamW" in name else {}
    line = f"import gracile.optim; OPTIMIZER = gracile.optim.{name}, {CLASSES[name][0] | of_adamw}"
    path = rewritten("trainer_causal_lm.py", line, tmp_path)
    trainer, losses = run(path, tmp_path / "out")
    assert_trained(trainer, losses, name, steps=8)
    moments = {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_absmax", "exp_avg_sq_absmax"}
    for state in trainer.optimizer.state.values():
        assert set(state) <= {"step", *moments}
    if of_adamw:
        assert losses == pytest.approx(losses_of_torch, rel=1e-5 if name in ("DCTAdamW", "LDAdamW") else 1e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in RESUMED else pytest.mark.thorough) for name in CLASSES]
)
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in RESUMED else pytest.mark.thorough) for name in LAYERED]
)
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
