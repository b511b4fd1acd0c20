"""``gracile finetune`` on one and two processes: killed, it goes on to the bits of a run that was not."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conversations import conversation, save_base, short_run
from helpers import same, weights
from safetensors.torch import load_file

from gracile.train.finetune import main

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
KILLED = str(Path(__file__).with_name("killed_finetune.py"))
ON_CPU = str(Path(__file__).with_name("fsdp_on_cpu.py"))
LORA = {"adapter": "lora", "adapter_args": {"r": 4, "lora_dropout": 0.1}}
GALORE = {"optimizer": "galore_adamw", "rank": 8, "update_proj_gap": 3, "packing": True}
GALORE |= {"learning_rate": 0.003, "max_steps": 5}  # before the end of an epoch, whose last batch is a part
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
thorough = pytest.mark.thorough


def deepspeed(stage):
    return ["--deepspeed", str(CONFIGS / f"zero{stage}.json")]


@pytest.mark.parametrize(
    ("processes", "more", "settings"),
    [
        pytest.param(1, [], LORA, id="one process, lora"),
        pytest.param(2, deepspeed(2), LORA, id="ZeRO 2, lora"),
        pytest.param(2, deepspeed(3), LORA, id="ZeRO 3, lora", marks=thorough),
        pytest.param(2, deepspeed(2), GALORE, id="ZeRO 2, galore", marks=thorough),
        pytest.param(2, deepspeed(3), GALORE, id="ZeRO 3, galore", marks=thorough),
        pytest.param(2, [], GALORE, id="DDP, galore", marks=thorough),
    ],
)
def test_killed_it_goes_on_to_the_same_bits_and_answers(processes, more, settings, tmp_path, metrics, pool):
    config = short_run(tmp_path, save_base(tmp_path / "base"), **settings)
    command = ["-m", "gracile.train.finetune", config, *more]
    whole = pool.run(processes, *command)
    assert whole.returncode == 0, whole.stdout[-3000:]
    again = ["--output_dir", str(tmp_path / "again")]
    killed = pool.run(processes, KILLED, config, *more, *again, "4")
    assert killed.returncode != 0
    assert (tmp_path / "again" / "checkpoint-3" / "complete.json").is_file()
    assert not (tmp_path / "again" / "metrics.json").exists()
    resumed = pool.run(processes, *command, *again, "--resume_from_checkpoint", "true")
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    assert "continuing from" in resumed.stdout
    one, other = tmp_path / "run", tmp_path / "again"
    assert metrics(other)["history"] == metrics(one)["history"]
    assert metrics(other)["forgetting_loss"] == metrics(one)["forgetting_loss"]
    assert same(weights(other), weights(one))
    if "adapter" in settings:
        file = "adapter/adapter_model.safetensors"
        assert same(load_file(other / file), load_file(one / file))
    answer = transformers.pipeline("text-generation", model=str(other))
    said = answer([conversation(0)[0]], max_new_tokens=4)[0]["generated_text"]
    assert said[-1]["role"] == "assistant"


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["-m", "gracile.train.finetune", *deepspeed(2)], id="ZeRO 2", marks=thorough),
        pytest.param(["-m", "gracile.train.finetune", *deepspeed(3)], id="ZeRO 3", marks=thorough),
        pytest.param(["-m", "gracile.train.finetune"], id="DDP"),
        pytest.param(
            [
                ON_CPU,
                "finetune",
                "--fsdp",
                "--fsdp_config",
                json.dumps({"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}),
            ],
            id="FSDP2",
            marks=thorough,
        ),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({**LORA, "adapter_args": {"r": 4}}, id="lora"),
        pytest.param(GALORE, id="galore", marks=thorough),
        pytest.param(
            {"adapter": "lora", "adapter_args": {"r": 4, "init_lora_weights": "corda"}}, id="corda", marks=thorough
        ),
    ],
)
def test_two_processes_train_the_run_of_one(settings, more, tmp_path, metrics, pool):
    """The loss is one over the tokens of both, whose rows carry different numbers of them."""
    base = save_base(tmp_path / "base")
    config = short_run(tmp_path, base, **settings)
    assert main([config]) == 0
    program, rest = more[:2], more[2:]
    halved = ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two")]
    two = pool.run(2, *program, config, *rest, *halved)
    assert two.returncode == 0, two.stdout[-3000:]
    one, other = metrics(tmp_path / "run"), metrics(tmp_path / "two")
    for key in ("examples", "parameters", "trainable_parameters", "steps"):
        assert other[key] == one[key], key
    for key in ("validation_loss", "validation_loss_before", "forgetting_loss"):
        assert other[key] == pytest.approx(one[key], rel=1e-4), key
    whole, split = weights(tmp_path / "run"), weights(tmp_path / "two")
    for key, value in whole.items():
        assert torch.linalg.vector_norm(value - split[key]) <= 1e-3 * torch.linalg.vector_norm(value), key
