"""``gracile pretrain`` in phases, sparse and then dense (SPDF), and with layers of a dense one's FLOPs (Sparse-IFT)."""

import json

import pytest
import torch
from helpers import interrupt, same, weights
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from gracile.models import build_llama
from gracile.models.convert import convert
from gracile.models.layers import IsoFlopLinear, ParallelLinear
from gracile.optim import SparseAdamW, param_groups
from gracile.train.build import model as building
from gracile.train.build.layers import layer_with, load_weights
from gracile.train.config.parser import load_config
from gracile.train.pretrain import main
from gracile.train.run.preflight import check_buildable

STATIC = {"optimizer": "sparse_adamw", "sparsity": 0.75, "drop_fraction": 0, "rank": None, "update_proj_gap": None}
DENSE = {"optimizer": "adamw", "model_overrides": None, "rank": None, "update_proj_gap": None}
PARALLEL = {"layer": "parallel", "optimizer": "rigl_adamw", "sparsity": 0.75, "update_every": 3, "rank": None}
PARALLEL |= {"update_proj_gap": None}
DENSE_WEIGHTS = 8 * 32 * 32 + 6 * 88 * 32  # of the matrices of a tiny run


def zeros(held):
    return {name: p == 0 for name, p in held.items() if "_proj" in name}


# ---- SPDF: sparse, then dense ---------------------------------------------------------------------------------------


def test_sparse_then_dense_at_equal_loss(tiny, tmp_path, metrics):
    first, second = tmp_path / "run", tmp_path / "dense"
    assert main([tiny(**STATIC, weight_decay=0.1)]) == 0
    masked = zeros(weights(first))
    assert len(masked) == 14
    assert all(int(mask.sum()) == mask.numel() * 3 // 4 for mask in masked.values())
    for step in (5, 10, 12):
        held = zeros(load_file(first / f"checkpoint-{step}" / "model.safetensors"))
        assert same(held, masked), "what is masked stays exactly zero, and nothing else is"

    start = {**DENSE, "model": str(first), "output_dir": str(second), "max_steps": 1, "save_steps": 1}
    assert main([tiny(**start, eval_on_start=True)]) == 0
    before, after = metrics(first), metrics(second)
    (entry,) = (e for e in after["history"] if e["step"] == 0 and "eval_loss" in e)
    assert entry["eval_loss"] == before["validation_loss"], "to the bit"
    moved = zeros(weights(second))
    assert not any(moved[name].any() for name in masked), "every weight has a gradient, and moves with the first step"
    assert after["optimizer_state_bytes"] >= 8 * after["parameters"]


def test_what_was_masked_moves_where_it_has_a_gradient_and_starts_without_moments(tmp_path):
    torch.manual_seed(0)
    model = build_llama("2m", hidden_size=32, intermediate_size=88, num_hidden_layers=1, vocab_size=64)
    tokens = torch.randint(64, (2, 16))
    sparse = SparseAdamW(param_groups(model, sparsity=0.75), lr=0.01, drop_fraction=0.0)
    for _ in range(3):
        sparse.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        sparse.step()
    before = model(tokens, labels=tokens).loss
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    loss = again(tokens, labels=tokens).loss
    assert torch.equal(loss, before)

    dense = torch.optim.AdamW(param_groups(again), lr=1e-3)
    loss.backward()
    masked = zeros(dict(again.named_parameters()))
    again.model.layers[0].mlp.up_proj.weight.grad[:5] = 0  # rows whose weights must stay where they are
    dense.step()
    for name, p in again.named_parameters():
        if name in masked:
            assert masked[name].sum() == 3 * p.numel() // 4
            assert torch.equal((p != 0)[masked[name]], (p.grad != 0)[masked[name]]), name
    assert not again.model.layers[0].mlp.up_proj.weight[:5][masked["model.layers.0.mlp.up_proj.weight"][:5]].any()


def test_masks_are_a_function_of_the_optimizers_seed_alone():
    def masks(seed, weights_seed, dtype=torch.float32):
        torch.manual_seed(weights_seed)
        overrides = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "vocab_size": 64}
        model = build_llama("2m", dtype=dtype, **overrides)
        SparseAdamW(param_groups(model, sparsity=0.75), drop_fraction=0.0, seed=seed)
        return zeros(dict(model.named_parameters()))

    first = masks(3, 0)
    assert same(first, masks(3, 1))
    assert same(first, masks(3, 2, torch.bfloat16))
    assert not same(first, masks(4, 0))
    names = [name for name in first if "q_proj" in name]
    assert not torch.equal(first[names[0]], first[names[1]]), "each layer has its own"


def test_both_recipes_run_one_after_the_other(corpus, tmp_path, monkeypatch, metrics):
    """Word for word but for the data, the size and the number of steps."""
    monkeypatch.chdir(tmp_path)
    small = '{"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 2, '
    small += '"vocab_size": 400}'
    shorter = ["--dataset", str(corpus), "--max_steps", "2", "--validation_blocks", "8", "--disable_tqdm", "true"]
    shorter += ["--per_device_train_batch_size", "2"]
    assert main(["quickstart_spdf_sparse", *shorter, "--model_overrides", small]) == 0
    assert main(["quickstart_spdf_dense", *shorter]) == 0
    first, second = (metrics(f"runs/quickstart_spdf_{phase}") for phase in ("sparse", "dense"))
    assert second["history"][0]["eval_loss"] == first["validation_loss"]
    assert (first["optimizer"], second["optimizer"]) == ("sparse_adamw", "adamw")


# ---- layers of a dense one's FLOPs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["quickstart_doped", "quickstart_factorised", "quickstart_parallel", "quickstart_wide"]
)
def test_recipes_have_the_dense_models_weights(name):
    config = load_config([name])
    architecture = building.architecture(config.model)
    check_buildable(config, architecture)
    model = building.untrained(config, architecture)
    dense = load_config(["quickstart", "--optimizer", "adamw"])
    plain = building.untrained(dense, building.architecture(dense.model))
    groups = param_groups(model, sparsity=config.optimizer.sparsity, target_modules=config.optimizer.target_modules)
    count = sum(share(group) * sum(p.numel() for p in group["params"]) for group in groups)
    assert round(count) == sum(p.numel() for p in plain.parameters())
    assert any(isinstance(module, IsoFlopLinear) for module in model.modules()) == (name != "quickstart_wide")


def share(group):
    if group.get("density") is not None:
        return group["density"]
    return 1 - (group.get("sparsity") or 0.0)


def test_parallel_goes_on_to_the_bit_and_its_last_checkpoint_is_the_model(tiny, tmp_path, metrics, capsys):
    config = tiny(**PARALLEL)
    assert main([config]) == 0
    assert "a tokenizer, checkpoints, the last of them the model," in capsys.readouterr().out
    run, last = tmp_path / "run", tmp_path / "run" / "checkpoint-12"
    assert not (run / "model.safetensors").exists()
    with pytest.raises(ValueError, match="Unrecognized model"):  # and not a LLaMA whose matrices are drawn anew
        AutoModelForCausalLM.from_pretrained(run)
    copy = interrupted_without_a_model(run, tmp_path / "copy")
    assert main([config, "--output_dir", str(copy), "--resume_from_checkpoint", "true"]) == 0
    held = load_file(last / "model.safetensors")
    assert same(held, load_file(copy / "checkpoint-12" / "model.safetensors"))
    assert metrics(run)["history"] == metrics(copy)["history"]
    branches = [p for name, p in held.items() if "_proj.W" in name]
    assert len(branches) == 4 * 14
    assert sum(int(p.count_nonzero()) for p in branches) == DENSE_WEIGHTS

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(last))
    model = convert(model.to_empty(device="cpu"), ParallelLinear, sparsity=0.75)
    load_weights(model, last)
    assert same(dict(model.state_dict()), held)


def interrupted_without_a_model(run, copy):
    for name in ("model.safetensors", "config.json"):
        (run / name).touch()
    interrupt(run, copy, keep="checkpoint-5")
    for name in ("model.safetensors", "config.json"):
        (run / name).unlink()
    return copy


def test_doped_keeps_the_dense_count_and_is_saved_merged(tiny, tmp_path):
    changes = {"layer": "doped", "optimizer": "set_adamw", "sparsity": 0.75, "update_every": 3, "update_proj_gap": None}
    assert main([tiny(**changes, rank=None)]) == 0
    held = load_file(tmp_path / "run" / "checkpoint-12" / "model.safetensors")
    sparse = sum(int(p.count_nonzero()) for name, p in held.items() if name.endswith("_proj.W"))
    low_rank = sum(p.numel() for name, p in held.items() if name.endswith(("_proj.U", "_proj.V")))
    assert sparse + low_rank == DENSE_WEIGHTS
    ranks = {p.shape[1] for name, p in held.items() if name.endswith("_proj.U")}
    assert ranks == {int(0.75 * 32 * 32 / 64), int(0.75 * 88 * 32 / 120)}, "the sparsity is the configuration's"
    saved = weights(tmp_path / "run")
    for name, p in saved.items():
        if "_proj" in name:
            stem = name.removesuffix("weight")
            exact = held[f"{stem}W"].double() + held[f"{stem}U"].double() @ held[f"{stem}V"].double()
            torch.testing.assert_close(p.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_layer_is_planned_beside_its_own_optimizers_only(tiny):
    config = load_config([tiny(**PARALLEL)])
    assert layer_with(config, "set_adamw") == "parallel"
    assert layer_with(config, "adamw") is None
    assert layer_with(load_config([tiny(optimizer="adamw", layer="low_rank")]), "galore_adamw") == "low_rank"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**PARALLEL, "optimizer": "adamw"},
            "layer parallel needs optimizer: sparse_adamw or set_adamw or rigl_adamw o",
        ),
        ({**PARALLEL, "optimizer": "wgsef_adamw"}, "layer parallel needs optimizer: sparse_adamw or set_adamw or rigl"),
        ({**PARALLEL, "sparsity": None}, "layer parallel: sparsity must be a number in [0, 1), got None"),
        (
            {**PARALLEL, "sparsity": 0.6},
            "layer parallel: sparsity must be 1 - 1/k for k branches, such as 0.5, got 0.6",
        ),
        ({**PARALLEL, "layer_args": {"sparsity": 0.5}}, "layer_args: parallel takes no 'sparsity'; known: activation"),
        (
            {**PARALLEL, "save_strategy": "no"},
            "layer parallel is not linear here and merges into no plain layer: its m",
        ),
        (
            {**PARALLEL, "layer": "factorised", "layer_args": {"activation": "relu"}, "save_strategy": "no"},
            "layer factorised is not linear here and merges into no plain layer: its model is the last checkpoint; "
            "save_strategy must be steps or epoch, got no",
        ),
        (
            {**PARALLEL, "layer": "doped", "optimizer": "block_sparse_adamw", "update_every": None},
            "layer doped with initial_sparsity 0.0 is a larger dense model at first; give optimizer_args: {",
        ),
        ({**STATIC, "sparsity": None}, "optimizer sparse_adamw needs sparsity, the share of weights that are zero"),
    ],
)
def test_bad_input_gets_one_line(changes, message, tiny, tmp_path, capsys):
    assert main([tiny(**changes)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"gracile pretrain: {message}"), told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_saves_nothing_is_fine_where_its_layers_merge(tiny, tmp_path):
    assert main([tiny(**{**PARALLEL, "layer": "factorised"}, save_strategy="no", max_steps=1)]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["hidden_size"] == 32
