"""What run.yaml tells is what ran, and a key that changes at a resumption is honoured or refused."""

import dataclasses
import json
import shutil

import pytest
import yaml
from helpers import interrupt, same, weights

from gracile.train.config.arguments import NOT_KEPT, RunArguments
from gracile.train.config.parser import field_names
from gracile.train.pretrain import main

RESUME = ["--resume_from_checkpoint", "true"]


@pytest.fixture(scope="module")
def base(tiny_in, tmp_path_factory):
    """A run of 12 steps with checkpoints at 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny_in(folder, logging_steps=1, lr_scheduler_type="linear")
    assert main([config]) == 0
    return config, folder / "run"


def settings(run):
    return yaml.safe_load((run / "run.yaml").read_text())["config"]


def rates(metrics, run):
    return {e["step"]: e["learning_rate"] for e in metrics(run)["history"] if "loss" in e}


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def test_run_yaml_runs_again_and_holds_every_key(base, tmp_path, metrics):
    _, run = base
    assert set(settings(run)) == field_names() - NOT_KEPT
    assert main([str(run / "run.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert metrics(tmp_path / "again")["history"] == metrics(run)["history"]
    assert same(weights(tmp_path / "again"), weights(run))
    one, other = settings(run), settings(tmp_path / "again")
    assert {key for key in one if one[key] != other[key]} == {"output_dir"}


def test_the_rate_and_the_length_of_a_resumed_run_are_those_it_is_given(base, tmp_path, metrics, capsys):
    """The rate of a linear schedule at step s of S is ``lr * (1 - (s - 1) / S)`` from the first resumed step on."""
    config, run = base
    old, new = rates(metrics, run), interrupt(run, tmp_path / "again", keep="checkpoint-5")
    assert main([config, "--output_dir", str(new), *RESUME, "--learning_rate", "0.02", "--max_steps", "20"]) == 0
    out = capsys.readouterr().out
    assert "learning_rate: 0.01 -> 0.02; the learning rate is that of the new schedule from step 6 on" in out
    assert "max_steps: 12 -> 20; " in out
    found = rates(metrics, new)
    for step in range(1, 6):
        assert found[step] == old[step]
    for step in range(6, 21):
        assert found[step] == pytest.approx(0.02 * (1 - (step - 1) / 20), rel=1e-6)
    assert max(found) == 20
    assert (settings(new)["learning_rate"], settings(new)["max_steps"]) == (0.02, 20)
    events = history(new)
    assert [event["event"] for event in events] == ["started", "finished", "started", "finished"]
    assert events[2]["changes"] == {"learning_rate": [0.01, 0.02], "max_steps": [12, 20]} | events[2]["changes"]
    assert (events[2]["step"], events[3]["step"]) == (5, 20)
    assert {"time", "gracile", "torch", "python", "host", "layout", "data"} <= events[2].keys()


def test_a_finished_run_can_be_made_longer(base, tmp_path, metrics):
    config, run = base
    longer = shutil.copytree(run, tmp_path / "longer")
    assert main([config, "--output_dir", str(longer), *RESUME, "--max_steps", "14"]) == 0
    assert metrics(longer)["steps"] == 14


def test_how_often_is_logged_and_saved_and_weight_decay_follow(base, tmp_path, metrics, capsys):
    config, run = base
    new = interrupt(run, tmp_path / "again", keep="checkpoint-5")
    more = ["--logging_steps", "4", "--save_steps", "3", "--weight_decay", "5"]
    assert main([config, "--output_dir", str(new), *RESUME, *more]) == 0
    assert [e["step"] for e in metrics(new)["history"] if "loss" in e and e["step"] > 5] == [6, 8, 9, 12]
    assert {p.name for p in new.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (5, 6, 9, 12)}
    assert (
        weights(new)["model.layers.0.self_attn.q_proj.weight"].norm()
        < 0.98 * weights(run)["model.layers.0.self_attn.q_proj.weight"].norm()
    ), "it decays"
    assert "no step computes anything else" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "3"], ["seed is 3", "has 42"]),
        (["--adam_beta1", "0.8"], ["adam_beta1", "0.8", "0.9"]),
        (["--bf16", "true"], ["bf16"]),
        (["--max_steps", "4"], ["max_steps is 4", "checkpoint-12", "step 12 already"]),
        (["--optimizer", "lion"], ["optimizer is 'lion'"]),
        (["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps"], ["lr_scheduler_type", "plateau"]),
    ],
)
def test_what_cannot_change_is_refused_and_run_yaml_stays(base, capsys, more, words):
    config, run = base
    before = {p: p.read_bytes() for p in (run / "run.yaml", run / "history.jsonl", run / "metrics.json")}
    assert main([config, *RESUME, *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert all(word in line for word in words), line
    assert {p: p.read_bytes() for p in before} == before


@pytest.fixture
def read(monkeypatch):
    """The examples that runs train on from here on, in their order."""
    from gracile.train.run.trainer import PretrainTrainer

    found, step = [], PretrainTrainer.training_step

    def spy(self, model, inputs, *rest, **keywords):
        found.extend(tuple(row) for row in inputs["input_ids"].tolist())
        return step(self, model, inputs, *rest, **keywords)

    monkeypatch.setattr(PretrainTrainer, "training_step", spy)
    return found


def test_steps_of_another_size_go_on_with_the_data_that_is_told(tiny, tmp_path, read, capsys):
    config = tiny(max_steps=10, report_to="none")
    assert main([config]) == 0
    data, run = list(read), tmp_path / "run"
    assert len(set(data)) == 80, "steps of 2 x 4"

    def goes_on(name, *more):
        again = interrupt(run, tmp_path / name, keep="checkpoint-5")
        read.clear()
        assert main([config, "--output_dir", str(again), *RESUME, "--max_steps", "6", *more]) == 0
        return capsys.readouterr().out

    told = goes_on("smaller", "--per_device_train_batch_size", "2")
    assert "4 -> 2; a step takes 4 examples from step 6 on, 8 before; the data goes on at example 20 in place " in told
    assert " in place of 40: 20 come again\n" in told
    assert read == data[20:24]
    told = goes_on("larger", "--gradient_accumulation_steps", "3")
    assert "2 -> 3; a step takes 12 examples from step 6 on, 8 before; the data goes on at example 60 in place " in told
    assert " in place of 40: 20 are left out\n" in told
    assert read == data[60:72]
    told = goes_on("same", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    assert "gradient_accumulation_steps: 2 -> 4; a step takes 8 examples as before\n" in told
    assert read == data[40:48]


def test_a_stream_goes_on_where_it_was_also_with_steps_of_another_size(tiny, tmp_path, read, capsys):
    config = tiny(streaming=True, max_steps=6, report_to="none")
    assert main([config]) == 0
    data, again = list(read), interrupt(tmp_path / "run", tmp_path / "again", keep="checkpoint-5")
    read.clear()
    assert main([config, "--output_dir", str(again), *RESUME, "--per_device_train_batch_size", "2"]) == 0
    told = capsys.readouterr().out
    assert "4 -> 2; a step takes 4 examples from step 6 on, 8 before; the data goes on where it was\n" in told
    assert read == data[40:44]


def test_a_key_that_run_yaml_does_not_hold_is_at_its_default(base, tmp_path, capsys):
    """It is of an older gracile, which had no such key."""
    config, run = base
    older = interrupt(run, tmp_path / "older", keep="checkpoint-10")
    told = yaml.safe_load((older / "run.yaml").read_text())
    del told["config"]["packing"], told["config"]["trust_remote_code"]
    (older / "run.yaml").write_text(yaml.safe_dump(told))
    again = [config, "--output_dir", str(older), *RESUME]
    assert main([*again, "--packing", "false", "--ignore_data_changes", "true"]) == 2
    assert "packing is False but the run in" in capsys.readouterr().err
    assert main([*again, "--trust_remote_code", "true"]) == 0
    out = capsys.readouterr().out
    assert "trust_remote_code: False -> True; " in out
    assert "packing" not in out


def test_every_key_of_the_trainer_is_known_to_change_or_not():
    from gracile.train.run import changes

    known = changes.SCHEDULE | changes.BATCH | changes.STEP | changes.AROUND
    assert known - {f.name for f in dataclasses.fields(RunArguments)} <= {
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "trust_remote_code",
        "activation_checkpointing_kwargs",
    }, "names that an older or newer transformers has"  # fmt: skip
