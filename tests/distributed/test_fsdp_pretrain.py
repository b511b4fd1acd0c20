"""``gracile pretrain`` under FSDP2: the run of one process, one that is stopped and goes on, and what it saves."""

import json
from pathlib import Path

import pytest
import torch
from helpers import interrupt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gracile.train.pretrain import main

ON_CPU = str(Path(__file__).with_name("fsdp_on_cpu.py"))


def fsdp(**changes):
    settings = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **changes}
    return ["--fsdp", "--fsdp_config", json.dumps(settings)]


def assert_close(whole, split):
    assert whole.keys() == split.keys()
    for key, value in whole.items():
        assert torch.linalg.vector_norm(value - split[key]) <= 1e-4 * torch.linalg.vector_norm(value), key


@pytest.fixture(scope="module")
def ran(tiny_in, tmp_path_factory, pool):
    """The folder of a run of two processes, by the form of its checkpoints, and its command but for the folder."""
    folders = {}

    def of(form):
        if form not in folders:
            folder = folders[form] = tmp_path_factory.mktemp(form)
            config = tiny_in(folder, max_steps=12, gradient_accumulation_steps=1)
            done = pool.run(2, ON_CPU, config, *fsdp(state_dict_type=form))
            assert done.returncode == 0, done.stdout[-3000:]
        return folders[form] / "run", [ON_CPU, str(folders[form] / "tiny.yaml"), *fsdp(state_dict_type=form)]

    return of


@pytest.mark.parametrize("form", [pytest.param("FULL_STATE_DICT", marks=pytest.mark.thorough), "SHARDED_STATE_DICT"])
def test_two_processes_train_the_run_of_one(form, ran, tiny, tmp_path, metrics, pool):
    """And stopped after a checkpoint, they go on to the same bits; what is saved is whole."""
    assert main([tiny(max_steps=12)]) == 0
    two, command = ran(form)
    one, other = metrics(tmp_path / "run"), metrics(two)
    assert (other["tokens"], other["parameters"]) == (one["tokens"], one["parameters"])
    split = load_file(two / "model.safetensors")
    assert_close(load_file(tmp_path / "run" / "model.safetensors"), split)
    assert_close(
        load_file(tmp_path / "run" / "checkpoint-5" / "model.safetensors"),
        load_file(two / "checkpoint-5" / "model.safetensors"),
    )
    loaded = AutoModelForCausalLM.from_pretrained(two).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in split.items())

    for key in ("weight_bytes", "gradient_bytes", "adamw_state_bytes"):
        assert 0.5 * one[key] <= other[key] <= 0.51 * one[key], key
    assert other["optimizer_state_bytes"] < 0.6 * one["optimizer_state_bytes"]

    onward = interrupt(two, tmp_path / "onward", keep="checkpoint-5")
    again = pool.run(2, *command, "--output_dir", str(onward), "--resume_from_checkpoint", "true")
    assert again.returncode == 0, again.stdout[-3000:]
    resumed = load_file(onward / "model.safetensors")
    assert all(torch.equal(split[key], value) for key, value in resumed.items())
    assert metrics(onward)["history"] == other["history"]


def test_on_four_processes_it_goes_on_from_the_checkpoint_of_two(ran, tmp_path, pool):
    two, command = ran("SHARDED_STATE_DICT")
    onward = interrupt(two, tmp_path / "onward", keep="checkpoint-10")
    more = ["--output_dir", str(onward), "--resume_from_checkpoint", "true", "--per_device_train_batch_size", "2"]
    done = pool.run(4, *command, *more)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "continuing from" in done.stdout
    assert_close(load_file(two / "model.safetensors"), load_file(onward / "model.safetensors"))


def test_a_finished_run_is_evaluated_again_and_not_trained(tiny, tmp_path, metrics, pool):
    command = [ON_CPU, tiny(max_steps=2), *fsdp()]
    done = pool.run(2, *command)
    assert done.returncode == 0, done.stdout[-3000:]
    before = metrics(tmp_path / "run")
    again = pool.run(2, *command, "--resume_from_checkpoint", "true")
    assert again.returncode == 0, again.stdout[-3000:]
    assert "nothing left to train" in again.stdout
    for key in ("history", "validation_loss", "optimizer_state_bytes", "weight_bytes"):
        assert metrics(tmp_path / "run")[key] == before[key], key


def test_what_cannot_be_split_is_refused_in_one_line(tiny, tmp_path, pool, capsys):
    assert main([tiny(), *fsdp()]) == 2
    assert "fsdp splits a model over processes, and there is one" in capsys.readouterr().err
    assert main([tiny(), *fsdp(version=1)]) == 2
    assert "fsdp_config: version must be 2, got 1" in capsys.readouterr().err
    result = pool.run(2, "-m", "gracile.train.pretrain", tiny(), *fsdp())
    assert result.returncode != 0
    assert result.stdout.count("gracile pretrain: fsdp: accelerate splits models over GPUs, not over CPUs") == 1
    assert not (tmp_path / "run").exists()
