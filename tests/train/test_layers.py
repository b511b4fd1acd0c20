"""``gracile pretrain`` with layers that store less: runs that go on, models that load anywhere, bad input."""

import subprocess
import sys

import pytest
import torch
from helpers import interrupt, same, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gracile.registry import LAYERS
from gracile.train.config.parser import load_config
from gracile.train.pretrain import main

# layer -> settings that let everything happen within twelve steps
RUNS = {
    "low_rank": {"optimizer": "adamw"},
    "sltrain": {"optimizer": "sltrain_adamw", "layer_args": {"density": 0.1}},
    "sst": {"optimizer": "sst_adamw", "optimizer_args": {"swap_every": 3, "iterations": 2}},
    "relora": {
        "optimizer": "relora_adamw",
        "layer_args": {"dropout": 0.1},
        "optimizer_args": {"merge_every": 4, "reset": "random"},
        "lr_restart_every": 4,
        "lr_restart_warmup": 2,
    },
    "autosparse": {"optimizer": "adamw", "layer_args": {"s_init": -3.0, "check_every": 2}, "weight_decay": 0.1},
    "maestro": {"optimizer": "adamw", "layer_args": {"shrink_every": 4, "threshold": 0.05, "penalty": 0.001}},
    "nm": {"optimizer": "sr_ste_adamw", "layer_args": {"n": 1, "m": 8, "decay": "linear", "fine_tune": 0.0}},
    "factorised": {"optimizer": "rigl_adamw", "sparsity": 0.75, "update_every": 3},
    "doped": {"optimizer": "set_adamw", "sparsity": 0.75, "update_every": 3},
    "cast": {"optimizer": "cast_adams", "layer_args": {"n": 1, "m": 8}, "optimizer_args": {"mask_every": 3}},
}


def settings(layer, **changes):
    return {"layer": layer, **RUNS[layer], "update_proj_gap": None, **changes}


@pytest.fixture(scope="module")
def trained(tiny_in, tmp_path_factory):
    """The configuration and the folder of a run with each layer, which nobody changes."""
    runs = {}

    def of(layer):
        if layer not in runs:
            folder = tmp_path_factory.mktemp(layer)
            runs[layer] = tiny_in(folder, **settings(layer)), folder / "run"
            assert main([runs[layer][0]]) == 0
        return runs[layer]

    return of


@pytest.mark.parametrize("layer", RUNS)
def test_a_run_goes_on_to_the_bit(layer, trained, tmp_path, metrics):
    config, run = trained(layer)
    copy = interrupt(run, tmp_path / "copy", keep="checkpoint-5")
    assert main([config, "--output_dir", str(copy), "--resume_from_checkpoint", "true"]) == 0
    assert same(weights(run), weights(copy))
    assert metrics(run)["history"] == metrics(copy)["history"]
    last = load_file(run / "checkpoint-12" / "model.safetensors")
    assert same(last, load_file(copy / "checkpoint-12" / "model.safetensors"))
    assert not same(last, weights(run)), "what is saved to go on with is not what is merged"


def test_its_model_loads_without_gracile(trained):
    script = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), (folder, told)
assert "gracile" not in sys.modules
"""
    folders = [str(trained(layer)[1]) for layer in RUNS]
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layer", RUNS)
def test_the_saved_model_computes_what_the_trained_one_did(layer, trained, tiny, tmp_path, metrics):
    """Its loss on the validation blocks is what the run told."""
    run = trained(layer)[1]
    told = metrics(run)
    again = tiny(model=str(run), model_overrides=None, max_steps=1, learning_rate=0.0, optimizer="adamw",
                 output_dir=str(tmp_path / "again"), update_proj_gap=None)  # fmt: skip
    assert main([again]) == 0
    assert metrics(tmp_path / "again")["validation_loss"] == pytest.approx(told["validation_loss"], rel=1e-5)


def test_relora_begins_with_a_saved_model(trained, tiny, tmp_path, metrics):
    """A warm start: before the first step it computes what the saved model does."""
    full = trained("low_rank")[1]
    told = metrics(full)
    start = {"model": str(full), "model_overrides": None}
    assert main([tiny(**settings("relora", **start, learning_rate=0.0, max_steps=1))]) == 0
    assert metrics(tmp_path / "run")["validation_loss"] == pytest.approx(told["validation_loss"], rel=1e-5)


def test_maestro_loses_components(tiny, tmp_path):
    assert main([tiny(**settings("maestro", layer_args={"shrink_every": 4, "threshold": 0.5}))]) == 0
    held = load_file(tmp_path / "run" / "checkpoint-12" / "model.safetensors")
    widths = [int(value) for key, value in held.items() if key.endswith("_extra_state")]
    assert min(widths) < 32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ranks = [int(torch.linalg.matrix_rank(p.double(), rtol=1e-6)) for n, p in model.named_parameters() if "_proj" in n]
    assert sorted(ranks) == sorted(widths)


def test_memory_counts_places_and_what_is_frozen(trained, metrics):
    told = metrics(trained("sltrain")[1])
    places = sum(int(0.1 * m * n) for m, n in [(32, 32)] * 8 + [(88, 32)] * 6)
    assert told["weight_bytes"] == 4 * told["parameters"] + 4 * places
    told = metrics(trained("sst")[1])
    frozen = sum(28 * (m + n) for m, n in [(32, 32)] * 8 + [(88, 32)] * 6)
    assert told["weight_bytes"] - told["gradient_bytes"] == 4 * frozen


def test_trained_with_a_pattern_a_model_has_it(trained, tiny, tmp_path):
    assert main([tiny(**settings("nm", optimizer="adamw", optimizer_args=None, max_steps=3))]) == 0
    for run in (tmp_path / "run", trained("nm")[1], trained("cast")[1]):
        held = {name: p for name, p in weights(run).items() if "_proj" in name}
        assert len(held) == 14
        for p in held.values():
            assert ((p != 0).unflatten(1, (-1, 8)).sum(2) == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "sltrian"}, "unknown layer 'sltrian'; did you mean 'sltrain'?"),
        ({"layer": "sst"}, "layer sst needs optimizer: sst_adamw, got galore_adamw"),
        ({"layer": "relora", "optimizer": "adamw"}, "layer relora needs optimizer: relora_adamw, got adamw"),
        ({"optimizer": "sltrain_adamw"}, "optimizer sltrain_adamw needs layer: sltrain, got none"),
        ({"layer": "sst", "optimizer": "relora_adamw"}, "optimizer relora_adamw needs layer: relora, got sst"),
        ({"layer_args": {"density": 0.1}}, 'layer_args {"density": 0.1} need a layer; choose one of low_rank'),
        ({**settings("sltrain"), "layer_args": {"desity": 1}}, "layer_args: sltrain takes no 'desity'; did you mean"),
        ({**settings("sltrain"), "layer_args": {"density": 2}}, "layer sltrain: density must be a number in [0, 1], g"),
        ({**settings("sst"), "rank": 33}, "layer sst: rank must be a whole number from 1 to 32 here, got 33"),
        ({**settings("sst"), "target_modules": ["mpl"]}, "layer sst: target_modules: 'mpl' matches no trainable lin"),
        ({**settings("sst"), "optimizer_args": {"swap_evry": 2}}, "optimizer_args: sst_adamw takes no 'swap_evry' th"),
        ({**settings("sst"), "optimizer_args": {"swap_every": 0}}, "swap_every must be a whole number >= 1, got 0"),
        ({**settings("relora"), "lr_restart_warmup": 4}, "lr_restart_warmup must be below lr_restart_every=4, got 4"),
        ({**settings("relora"), "lr_restart_every": 0}, "lr_restart_every must be a whole number >= 1, got 0"),
        ({**settings("autosparse"), "layer_args": {"annealing": 2}}, "layer_args: annealing must be a number in [0, 1"),
        ({**settings("autosparse"), "layer_args": {"sparsity": 1}}, "layer autosparse: sparsity must be a number in ["),
        ({**settings("autosparse"), "dtype": "bfloat16"}, "layer autosparse needs dtype: float32, for thresholds move"),
        ({**settings("cast"), "optimizer": "adamw"}, "layer cast needs optimizer: cast_adams, got adamw"),
        ({**settings("nm"), "layer": None, "layer_args": None}, "optimizer sr_ste_adamw needs layer: nm, got none"),
        ({**settings("nm"), "layer_args": {"m": 5}}, "layer nm: in_features must be a multiple of m=5, got 32"),
        ({**settings("nm"), "layer_args": {"dense": 0.1}}, "layer_args: dense needs a decay; choose one of linear, "),
        ({**settings("nm"), "layer_args": {"decay": "slow"}}, "layer_args: decay must be one of linear, exponential"),
        ({**settings("nm"), "optimizer_args": {"n": 2}}, "optimizer_args: sr_ste_adamw takes no 'n' there; known: "),
        ({**settings("cast"), "layer_args": {"pieces": 5}}, "layer cast: pieces must be a whole number that divides i"),
        ({**settings("cast"), "max_steps": -1}, "total_steps is 1 of max_steps by default; give one of the two"),
        ({**settings("maestro"), "layer_args": {"sampler": "two"}}, "layer_args: sampler must be one of one, each, n"),
    ],
)
def test_bad_input_gets_one_line(changes, message, tiny, tmp_path, capsys):
    assert main([tiny(**changes)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"gracile pretrain: {message}"), told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_layer_is_tried_and_named_in_the_help():
    assert RUNS.keys() | {"parallel"} == LAYERS.keys(), "which saves no other model: tests/train/test_phases.py"
    fields = {f.name: f for f in type(load_config(["quickstart"]).model).__dataclass_fields__.values()}
    assert all(name in fields["layer"].metadata["help"] for name in LAYERS)


def test_widths_are_drawn_for_a_pass_and_not_by_it(trained, tiny, tmp_path):
    """With activations checkpointed, each pass is done twice, and is the same run."""
    assert main([tiny(**settings("maestro", activation_checkpointing=True))]) == 0
    one, other = weights(trained("maestro")[1]), weights(tmp_path / "run")
    assert all(torch.allclose(one[key], other[key], rtol=1e-5, atol=1e-6) for key in one)
