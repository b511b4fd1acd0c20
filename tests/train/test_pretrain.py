"""Whole runs of ``gracile pretrain`` on real text, in this process."""

import functools
import json
import math
import shutil

import pytest
import torch
import transformers
import yaml
from helpers import interrupt, same, weights
from torch import nn
from transformers import AutoModelForCausalLM

from gracile.models import build_llama
from gracile.optim import state_bytes
from gracile.registry import OPTIMIZERS
from gracile.train.build.callbacks import EvaluateAt
from gracile.train.build.optimizer import build_optimizer
from gracile.train.config.parser import load_config
from gracile.train.pretrain import main
from gracile.train.run import checkpoints, trainer


@pytest.fixture(scope="module")
def base(tiny_in, tmp_path_factory):
    """A run of 12 steps with checkpoints at 5, 10 and 12, which nobody changes: its configuration and folder."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny_in(folder)
    assert main([config]) == 0
    return config, folder / "run"


@pytest.mark.draws
def test_a_run_leaves_what_it_promises(tiny, tmp_path, metrics, capsys):
    assert main([tiny(max_steps=60, gradient_accumulation_steps=1, evaluate_at=[5])]) == 0
    run = tmp_path / "run"
    table = capsys.readouterr().out
    for name in ("metrics.json", "loss.png", "run.yaml", "model.safetensors", "tokenizer.json", "runs"):
        assert (run / name).exists(), name
    assert next((run / "runs").rglob("events.out.tfevents*")).stat().st_size > 0

    told = metrics(run)
    assert told["tokens"] == 60 * 4 * 32
    validation = {entry["step"]: entry["eval_loss"] for entry in told["history"] if "eval_loss" in entry}
    assert set(validation) == {5, 60}
    assert validation[60] < validation[5] - 0.5, "it learns"
    assert told["validation_loss"] == validation[60]
    assert math.isclose(told["validation_perplexity"], math.exp(validation[60]))
    for words in ("validation perplexity", "tokens / s", "peak memory", "plain AdamW"):
        assert words in table

    model = transformers.AutoModelForCausalLM.from_pretrained(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    assert told["weight_bytes"] == told["gradient_bytes"] == 4 * told["parameters"]
    generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = generate("def ", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith("def ")
    assert len(text) > len("def ")


def test_memory_told_is_the_memory_held(tiny, tmp_path, metrics, monkeypatch):
    built = []
    build = trainer.build_optimizer
    monkeypatch.setattr(trainer, "build_optimizer", lambda *a: built.append(build(*a)) or built[-1])
    assert main([tiny(max_steps=2)]) == 0
    assert main([tiny(max_steps=2, optimizer="adamw", output_dir=str(tmp_path / "dense"))]) == 0
    low, dense = metrics(tmp_path / "run"), metrics(tmp_path / "dense")
    assert low["optimizer_state_bytes"] == state_bytes(built[0])
    assert dense["optimizer_state_bytes"] == state_bytes(built[1]) == dense["adamw_state_bytes"]
    assert low["adamw_state_bytes"] == dense["adamw_state_bytes"] > low["optimizer_state_bytes"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"streaming": True, "save_steps": 7},
        {"optimizer": "adamw", "dtype": "bfloat16"},
        {"dtype": "bfloat16", "learning_rate": 0.05},
        {"max_steps": -1, "num_train_epochs": 0.02, "save_steps": 10, "gradient_accumulation_steps": 1},
    ],
    ids=["galore", "streaming", "adamw bf16", "galore bf16", "epochs"],
)
def test_losses_and_weights_after_a_resume_are_bit_for_bit_the_same(tiny, tmp_path, metrics, changes):
    whole = tmp_path / "run"
    config = tiny(**changes)
    assert main([config]) == 0
    first = checkpoints.checkpoints(whole)[-1].name
    broken = interrupt(whole, tmp_path / "again", keep=first)
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    one, other = metrics(whole), metrics(broken)
    assert one["steps"] > int(first.split("-")[1]), "there was something left to do"
    assert other["history"] == one["history"]
    assert other["validation_loss"] == one["validation_loss"]
    assert same(weights(broken), weights(whole))


# Of these a run goes on here too; of all, an optimizer by itself and one under DeepSpeed's engine do in other files.
RESUMED = ["lion", "galore_adamw_8bit", "galore_adafactor", "dct_adamw", "ldadamw", "srigl_adamw", "sst_adamw"]
OTHERS = [name for name in OPTIMIZERS if name not in ("adamw", "galore_adamw")]


@pytest.mark.parametrize("optimizer", [name for name in OTHERS if name not in RESUMED])
def test_every_other_optimizer_trains(tiny, tmp_path, metrics, optimizer):
    train(tiny, tmp_path, metrics, optimizer)


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=() if name in RESUMED else pytest.mark.thorough) for name in OTHERS]
)
def test_one_of_each_kind_resumes_bit_for_bit(tiny, tmp_path, metrics, optimizer):
    config, told = train(tiny, tmp_path, metrics, optimizer, save_steps=7)
    broken = interrupt(tmp_path / "run", tmp_path / "again", keep="checkpoint-7")
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    assert metrics(broken)["history"] == told["history"]
    assert same(weights(broken), weights(tmp_path / "run"))


def train(tiny, tmp_path, metrics, optimizer, save_steps=20):
    rate = {"lion": 0.001, "galore_lion": 0.004}.get(optimizer, 0.01)
    masked = {"sparsity": 0.3} if OPTIMIZERS[optimizer].accepts() & {"sparsity", "keep"} else {}
    masked |= {"optimizer_args": {"block_size": 8}} if optimizer == "block_sparse_adamw" else {}
    own = {"optimizer": optimizer, "layer": OPTIMIZERS[optimizer].layer, "learning_rate": rate, **masked}
    short = {"max_steps": 20, "save_steps": save_steps, "gradient_accumulation_steps": 1}
    config = tiny(**own, **short, subspace_method="iterate")
    assert main([config]) == 0
    told = metrics(tmp_path / "run")
    losses = [entry["loss"] for entry in told["history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2, "it learns"
    return config, told


def test_resume_crosses_an_epoch(tiny, tmp_path, metrics, corpus):
    text = (corpus / "argparse.txt").read_text(encoding="utf-8")[:6_000]
    (tmp_path / "small.txt").write_text(text, encoding="utf-8")
    config = tiny(dataset=str(tmp_path / "small.txt"), max_steps=30, save_steps=10)
    assert main([config]) == 0
    broken = interrupt(tmp_path / "run", tmp_path / "again", keep="checkpoint-10")
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    assert metrics(broken)["history"] == metrics(tmp_path / "run")["history"]
    assert same(weights(broken), weights(tmp_path / "run"))


def test_a_checkpoint_cut_short_is_named_and_skipped(base, tmp_path, capsys):
    config, run = base
    broken = interrupt(run, tmp_path / "again", keep="checkpoint-5")
    shutil.copytree(run / "checkpoint-10", broken / "checkpoint-10")
    with open(broken / "checkpoint-10" / "optimizer.pt", "r+b") as file:
        file.truncate(100)
    capsys.readouterr()
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    out = capsys.readouterr().out
    assert f"skipping {broken / 'checkpoint-10'}: optimizer.pt has 100 of" in out
    assert f"continuing from {broken / 'checkpoint-5'}" in out
    assert same(weights(broken), weights(run))
    assert checkpoints.fault(broken / "checkpoint-10") is None, "it was written again, whole"


def test_flipped_bytes_are_named_and_the_run_goes_on_from_the_checkpoint_before(base, tmp_path, metrics, capsys):
    config, run = base
    broken = interrupt(run, tmp_path / "again", keep="checkpoint-5")
    damaged = broken / "checkpoint-10"
    shutil.copytree(run / "checkpoint-10", damaged)
    for file in damaged.iterdir():  # any of them: sizes stay
        data = file.read_bytes()
        file.write_bytes(data[:-64] + bytes(255 - byte for byte in data[-64:]))
        assert file.name in checkpoints.fault(damaged)
        file.write_bytes(data)
    assert checkpoints.fault(damaged) is None
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64] + bytes(64))
    capsys.readouterr()
    resume = [config, "--output_dir", str(broken), "--resume_from_checkpoint"]
    assert main([*resume, str(damaged)]) == 2
    assert "is not whole: model.safetensors is not what was written" in capsys.readouterr().err
    assert main([*resume, "true"]) == 0
    out = capsys.readouterr().out
    assert f"skipping {damaged}: model.safetensors is not what was written (its checksum differs)" in out
    assert f"continuing from {broken / 'checkpoint-5'}" in out
    assert metrics(broken)["history"] == metrics(run)["history"]
    assert same(weights(broken), weights(run))


def test_a_checkpoint_of_before_checksums_is_resumed_and_said_to_have_none(base, tmp_path, capsys):
    config, run = base
    broken = interrupt(run, tmp_path / "again", keep="checkpoint-10")
    manifest = broken / "checkpoint-10" / checkpoints.MANIFEST
    sizes = {name: size for name, (size, _) in json.loads(manifest.read_text())["files"].items()}
    manifest.write_text(json.dumps(sizes))
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    assert capsys.readouterr().out.count("has no checksums") == 1
    assert same(weights(broken), weights(run))


def test_a_damaged_only_checkpoint_is_not_begun_again_silently(tiny, tmp_path, capsys):
    assert main([tiny(max_steps=6)]) == 0
    broken = interrupt(tmp_path / "run", tmp_path / "again", keep="checkpoint-6")
    (broken / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    assert main([tiny(max_steps=6), "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 2
    assert "no whole checkpoint: optimizer.pt has 0 of" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe", b"config: [", b"3", b"config: 3", b"data: x\nconfig: 3", b""])
def test_a_run_file_that_cannot_be_read_is_one_line(tiny, tmp_path, capsys, content):
    folder = tmp_path / "run" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    checkpoints.seal(folder)
    (tmp_path / "run" / "run.yaml").write_bytes(content)
    assert main([tiny(), "--resume_from_checkpoint", "true"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "run.yaml' does not say what the run began with" in err


def test_resuming_a_finished_run_trains_no_step_more(base, tmp_path, metrics):
    config, run = base
    again = shutil.copytree(run, tmp_path / "again")
    assert main([config, "--output_dir", str(again), "--resume_from_checkpoint", "true"]) == 0
    before, after = metrics(run), metrics(again)
    assert same(weights(again), weights(run))
    assert after["tokens_per_second"] is None
    for key in ("steps", "validation_loss", "history", "optimizer_state_bytes"):
        assert after[key] == before[key], key


def test_a_run_stopped_before_its_first_checkpoint_starts_again(base, tmp_path, metrics, capsys):
    config, run = base
    broken = interrupt(run, tmp_path / "again", keep="none")
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    assert "starting it again" in capsys.readouterr().out
    assert metrics(broken)["history"] == metrics(run)["history"]


def test_older_checkpoints_go_only_after_the_new_one_is_sealed(tiny, tmp_path, monkeypatch):
    seen = []
    seal = checkpoints.seal

    def spying_seal(checkpoint):
        before, _ = checkpoints.newest_whole(checkpoint.parent)
        seen.append(before and before.name)
        seal(checkpoint)

    monkeypatch.setattr(checkpoints, "seal", spying_seal)
    assert main([tiny(save_total_limit=1, save_steps=4)]) == 0
    assert seen == [None, "checkpoint-4", "checkpoint-8"], "a whole one is there at every moment"
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-12"]


def test_a_loss_that_turns_non_finite_stops_the_run_and_the_last_checkpoint_stays(tiny, tmp_path, monkeypatch, capsys):
    forward = transformers.LlamaForCausalLM.forward

    @functools.wraps(forward)  # the Trainer reads its signature
    def failing(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            failing.calls += 1
            if failing.calls > 2 * 6:  # two micro-batches a step: from step 7 on
                output.loss = output.loss * float("nan")
        return output

    failing.calls = 0
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", failing)
    assert main([tiny()]) == 1
    err = capsys.readouterr().err
    assert f"the loss at step 7 is not finite; the last good checkpoint is {tmp_path / 'run' / 'checkpoint-5'}" in err
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-5"]
    saved = weights(tmp_path / "run" / "checkpoint-5")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    monkeypatch.undo()
    assert main([tiny(), "--resume_from_checkpoint", "true"]) == 0


def test_weights_that_turn_non_finite_are_never_saved(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EvaluateAt, "on_optimizer_step", explode_at_step(5), raising=False)
    assert main([tiny(max_steps=12)]) == 1
    assert "model.embed_tokens.weight holds non-finite values" in capsys.readouterr().err
    assert checkpoints.checkpoints(tmp_path / "run") == []


def explode_at_step(step):
    def hook(self, args, state, control, model=None, **kwargs):
        if state.global_step == step - 1:  # counted up after this hook
            with torch.no_grad():
                model.model.embed_tokens.weight[0, 0] = float("inf")
        return control

    return hook


def test_a_saved_model_trains_on(base, tiny, tmp_path, metrics):
    _, run = base
    assert main([tiny(model=str(run), model_overrides=None)]) == 0
    assert metrics(tmp_path / "run")["validation_loss"] < metrics(run)["validation_loss"]


def test_the_seed_decides_the_run(tiny, tmp_path, metrics):
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main([tiny(seed=seed, max_steps=3, logging_steps=1, output_dir=str(tmp_path / name))]) == 0
        losses.append([entry.get("loss") for entry in metrics(tmp_path / name)["history"]])
    assert losses[0] == losses[1] != losses[2]


TINY = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 400}
BAD = {
    "optimizer": ({"optimizer": "galore_adam"}, ["galore_adam'", "did you mean 'galore_adamw'"]),
    "size": ({"model": "2mm", "model_overrides": None}, ["2mm", "did you mean '2m'"]),
    "override": ({"model_overrides": {"hiden_size": 3}}, ["hiden_size", "hidden_size"]),
    "override that does not fit": ({"model_overrides": {"num_attention_heads": 7}}, ["attention heads"]),
    "override of a path": ({"model": "some/where"}, ["model_overrides", "some/where"]),
    "key": ({"update_gap": 3}, ["update_gap"]),
    "rank 0": ({"rank": 0}, ["rank", "0"]),
    "rank not whole": ({"rank": 1.5}, ["rank", "1.5"]),
    "gap": ({"update_proj_gap": 0}, ["update_proj_gap", "0"]),
    "side": ({"proj_type": "up"}, ["proj_type", "'up'"]),
    "scale": ({"scale": "nan"}, ["scale", "nan"]),
    "optimizer_args": ({"optimizer_args": "8bit"}, ["optimizer_args", "8bit", "mapping such as"]),
    "key in optimizer_args": (
        {"optimizer": "dct_adamw", "optimizer_args": {"error_feedbak": "8bit"}},
        ["optimizer_args", "'error_feedbak'", "did you mean 'error_feedback'"],
    ),
    "value in optimizer_args": (
        {"optimizer": "dct_adamw", "optimizer_args": {"error_feedback": "2bit"}},
        ["error_feedback", "'2bit'"],
    ),
    "key of ours in optimizer_args": ({"optimizer_args": {"scale": 1}}, ["optimizer_args", "'scale'"]),
    "target": ({"target_modules": ["attn", "mpl"]}, ["'mpl'", "did you mean 'mlp'"]),
    "data": ({"dataset": "./nowhere.txt"}, ["./nowhere.txt", "does not exist"]),
    "text too short": (
        {"block_size": 500_000, "model_overrides": TINY | {"max_position_embeddings": 500_000}},
        ["0 block(s)", "block_size=500000"],
    ),
    "tokenizer": ({"tokenizer": "no/where"}, ["no/where"]),
    "no checkpoint": ({"resume_from_checkpoint": "true"}, ["no whole checkpoint", "run'"]),
    "not a checkpoint": ({"resume_from_checkpoint": "elsewhere/checkpoint-3"}, ["elsewhere/checkpoint-3"]),
    "dtype": ({"dtype": "float8"}, ["float8"]),
    "batch": ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size", "0"]),
    "output folder": ({"output_dir": "/dev/null/run"}, ["/dev/null/run", "Not a directory"]),
    "nothing to train": ({"max_steps": 0}, ["max_steps is 0"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(tiny, tmp_path, capsys, case):
    changes, words = BAD[case]
    assert main([tiny(**changes)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    message = err[-1]
    assert [line for line in err if line.startswith("gracile pretrain:")] == [message]
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny, tmp_path, capsys):
    assert main([tiny(max_steps=1)]) == 0
    overrides = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 300}
    config = tiny(tokenizer=str(tmp_path / "run"), model_overrides=overrides, output_dir=str(tmp_path / "other"))
    assert main([config]) == 2
    assert "400 entries, more than the model's vocab_size 300" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_another_run_is_never_overwritten_nor_continued_as_something_else(tiny, tmp_path, capsys):
    config = tiny(max_steps=6)
    assert main([config]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert main([config]) == 2
    assert "holds another run" in capsys.readouterr().err
    resume = ["--resume_from_checkpoint", "true"]
    for change in (["--rank", "8"], ["--optimizer", "adamw"], ["--block_size", "64"]):
        assert main([config, *resume, *change]) == 2
        assert change[0][2:] in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_resuming_on_changed_data_is_refused(tiny, tmp_path, capsys, corpus):
    data = tmp_path / "data.txt"
    shutil.copy(corpus / "argparse.txt", data)
    config = tiny(dataset=str(data), max_steps=6)
    assert main([config]) == 0
    size = data.stat().st_size
    data.write_text(data.read_text(encoding="utf-8") + "more", encoding="utf-8")
    assert main([config, "--resume_from_checkpoint", "true", "--max_steps", "8"]) == 2
    assert f"data.txt has {size + 4:,} bytes, {size:,} when it began" in capsys.readouterr().err


def test_optimizer_args_reach_the_optimizer_and_keys_without_effect_are_named(tiny, tmp_path, metrics, capsys):
    """Error feedback in 8 bits costs a byte for each entry of a target, and two numbers for each line."""
    plain = tiny(optimizer="dct_adamw", scale=0.25, max_steps=2)
    assert main([plain]) == 0
    assert "no effect with dct_adamw: scale" in capsys.readouterr().out
    args = {"optimizer_args": {"error_feedback": "8bit"}, "output_dir": str(tmp_path / "fed")}
    assert main([tiny(optimizer="dct_adamw", max_steps=2, scale=None, **args)]) == 0
    assert "no effect" not in capsys.readouterr().out
    more = metrics(tmp_path / "fed")["optimizer_state_bytes"] - metrics(tmp_path / "run")["optimizer_state_bytes"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fed")
    targets = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert more == sum(p.numel() + 8 * max(p.shape) for p in targets)


def test_galore_plus_knows_the_heads_of_a_llama(tiny):
    """Grouped queries: q has more heads than k and v; the others have none."""
    heads = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = load_config([tiny(optimizer="galore_plus_adamw", model_overrides=heads)])
    model = build_llama("2m", **heads)
    groups = build_optimizer(model, config.optimizer, config.run).param_groups
    names = {id(p): name.split(".")[-2] for name, p in model.named_parameters()}
    found = {names[id(p)]: g["num_heads"] for g in groups if g["rank"] for p in g["params"]}
    assert found == {"q_proj": 4, "k_proj": 2, "v_proj": 2} | dict.fromkeys(
        ("o_proj", "gate_proj", "up_proj", "down_proj")
    )


def test_run_file_holds_the_resolved_configuration(tiny, tmp_path):
    assert main([tiny(max_steps=1), "--rank", "3"]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert saved["config"]["rank"] == 3
    assert saved["config"]["update_proj_gap"] == 4
    assert saved["config"]["proj_type"] == "std", "defaults are spelled out"
