"""``gracile pretrain`` from dense to sparse: exact counts in the saved model, resumed runs, and ART's looks."""

import json
import math

import pytest
import torch
from helpers import interrupt, same, weights
from safetensors.torch import load_file
from torch import nn

from gracile.optim import HyperSparseAdamW
from gracile.train.pretrain import main
from gracile.train.run.art import is_time, without_smallest

HYPER = {"optimizer": "hyper_sparse_adamw", "sparsity": 0.7, "rank": None, "update_proj_gap": None}
HYPER |= {"optimizer_args": {"interval": 2, "quantile_every": 3, "hs_lambda": 1e-3, "prune_at": 8}}
WGSEF = {"optimizer": "wgsef_adamw", "sparsity": 0.75, "rank": None, "update_proj_gap": None}


def targets_of(run):
    return {name: p for name, p in weights(run).items() if "_proj" in name}


def zeros(held):
    return sum(int((p == 0).sum()) for p in held.values()), sum(p.numel() for p in held.values())


def test_hyper_sparse_saves_exactly_the_weights_that_stay_and_goes_on_to_the_bit(tiny, tmp_path, metrics):
    config = tiny(**HYPER)
    assert main([config]) == 0
    run = tmp_path / "run"
    pruned, count = zeros(targets_of(run))
    assert pruned == math.floor(0.7 * count)
    assert zeros(load_file(run / "checkpoint-5" / "model.safetensors"))[0] == 0
    copy = interrupt(run, tmp_path / "copy", keep="checkpoint-5")
    assert main([config, "--output_dir", str(copy), "--resume_from_checkpoint", "true"]) == 0
    assert same(weights(run), weights(copy))


@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_wgsef_saves_whole_groups_at_the_shares_of_a_run(tiny, tmp_path, groups):
    """By default the last choice comes at 80 percent of the steps."""
    assert main([tiny(**WGSEF, optimizer_args={"groups": groups, "wgsef_lambda": 0.1})]) == 0
    held = targets_of(tmp_path / "run")
    assert len(held) == 14
    for p in held.values():
        alive = (p if groups == "rows" else p.T).any(1)
        assert int(alive.sum()) == len(alive) // 4


def test_autosparse_tells_its_density_and_saves_it(tiny, tmp_path, metrics):
    changes = {"layer": "autosparse", "layer_args": {"s_init": -4.0, "check_every": 1}, "optimizer": "adamw"}
    assert main([tiny(**changes, update_proj_gap=None, learning_rate=1e-6)]) == 0
    told = [entry["density"] for entry in metrics(tmp_path / "run")["history"] if "density" in entry]
    pruned, count = zeros(targets_of(tmp_path / "run"))
    assert len(told) >= 4
    assert told[-1] == pytest.approx(1 - pruned / count, abs=2e-3)
    assert 0.2 < told[-1] < 0.8


# ---- ART ------------------------------------------------------------------------------------------------------------


def test_it_is_time_when_a_mean_of_three_is_as_good_as_the_dense_model():
    dense = [1.0, 1.0, 1.0, 1.0, 1.0]
    assert not is_time([0.5, 0.5], dense[:2])
    assert is_time([0.9, 1.0, 1.1], dense[:3])
    assert not is_time([3.0, 2.0, 1.5], dense[:3])
    assert is_time([3.0, 0.8, 0.8, 0.8, 9.0], dense), "the best three count"
    assert not is_time([1.1, 1.0, 0.9], [1.0, 0.9, 0.8]), "losses that fall are averaged alike"


def test_weights_come_back_as_they_were():
    held = [torch.randn(5, 7), torch.randn(3, 4).bfloat16()]
    before = [W.clone() for W in held]
    pruned = 0

    def interrupted():
        nonlocal pruned
        with without_smallest(held, 0.5):
            pruned = sum(int((W == 0).sum()) for W in held)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert pruned == 23
    assert all(torch.equal(W, was) for W, was in zip(held, before, strict=True))


def test_the_penalty_brings_the_time_about():
    """Least squares, trained, where most weights are noise: without a penalty it never comes."""
    ends = {}
    for strength in (0.0, 3e-4):
        torch.manual_seed(0)
        X = torch.randn(400, 40)
        truth = torch.randn(40) * (torch.arange(40) < 8)
        y = X @ truth + torch.randn(400)
        w = nn.Parameter(0.5 * torch.randn(1, 40))
        keys = {"hs_lambda": strength, "hs_growth": 1.2, "interval": 10, "quantile_every": 5, "warmup_steps": 300}
        optimizer = HyperSparseAdamW([w], lr=0.01, sparsity=0.8, **keys)
        pruned, dense = [], []
        for step in range(1, 1001):
            optimizer.zero_grad()
            loss = (X @ w[0] - y).square().mean()
            loss.backward()
            optimizer.step()
            if step % 10 == 0 and step > 300:
                with torch.no_grad(), without_smallest([w], 0.8):
                    pruned.append((X @ w[0] - y).square().mean().item())
                dense.append((X @ w[0] - y).square().mean().item())
                if is_time(pruned, dense):
                    break
        ends[strength] = step
        optimizer.finish()
        assert int((w == 0).sum()) == 32
    assert ends[0.0] == 1000
    assert ends[3e-4] < 800


def test_art_looks_and_prunes_when_it_is_time_also_when_resumed(tiny, tmp_path):
    """Without anything to prune the two losses are equal: after the third look it is time."""
    own = {**HYPER, "sparsity": 0.0, "art_every": 2, "eval_strategy": "no"}
    config = tiny(**own)
    assert main([config]) == 0
    run = tmp_path / "run"
    told = art_entries(run)
    assert [entry["step"] for entry in told] == [2, 4, 6]
    assert all(entry["art_dense_loss"] == pytest.approx(entry["art_pruned_loss"]) for entry in told)
    assert told[0]["art_dense_loss"] > told[-1]["art_dense_loss"]
    saved = torch.load(run / "checkpoint-12" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["prune_at"] == 7
    copy = interrupt(run, tmp_path / "copy", keep="checkpoint-5")
    assert main([config, "--output_dir", str(copy), "--resume_from_checkpoint", "true"]) == 0
    assert art_entries(copy) == told
    assert same(weights(run), weights(copy))


def art_entries(run):
    state = json.loads((run / "checkpoint-12" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "art_dense_loss" in entry]


def test_art_waits_for_the_end_where_pruning_hurts(tiny, tmp_path):
    assert main([tiny(**{**HYPER, "sparsity": 0.95}, art_every=2)]) == 0
    told = art_entries(tmp_path / "run")
    assert [entry["step"] for entry in told] == [2, 4, 6]
    assert all(entry["art_pruned_loss"] != entry["art_dense_loss"] for entry in told)
    pruned, count = zeros(targets_of(tmp_path / "run"))
    assert pruned == math.floor(0.95 * count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**HYPER, "sparsity": None},
            "optimizer hyper_sparse_adamw needs sparsity, the share of weights that are zero",
        ),
        ({**HYPER, "sparsity": 1.0}, "sparsity must be a number in [0, 1) or None, got 1.0"),
        ({**WGSEF, "sparsity": 1.0}, "keep must be a number in (0, 1] or None, got 0.0"),
        ({**WGSEF, "optimizer_args": {"keep": 0.5}}, "optimizer_args: wgsef_adamw takes no 'keep' there"),
        ({**WGSEF, "optimizer_args": {"groups": "heads"}}, "groups must be one of rows, columns, blocks, got 'heads'"),
        ({**HYPER, "art_every": 0}, "art_every must be a whole number >= 1, got 0"),
        ({**WGSEF, "art_every": 5}, "art_every is for optimizer hyper_sparse_adamw, got wgsef_adamw"),
    ],
)
def test_bad_input_gets_one_line(changes, message, tiny, tmp_path, capsys):
    assert main([tiny(**changes)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"gracile pretrain: {message}"), told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()
