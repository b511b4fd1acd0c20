"""Whole runs of ``gracile finetune``, in this process: what they leave, and that they go on to the bit."""

import json
import math
import shutil

import peft
import pytest
import torch
import transformers
import yaml
from conversations import NAMES, conversation, write
from helpers import interrupt, same, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gracile.train.build.tuned_model import load_base
from gracile.train.config.finetune_arguments import FinetuneConfig
from gracile.train.config.parser import load_settings
from gracile.train.data.chat import TEMPLATES
from gracile.train.finetune import main
from gracile.train.run import checkpoints

LORA = {"adapter": "lora", "adapter_args": {"r": 4, "lora_dropout": 0.1}}
# then the order of an epoch is drawn from the state that what is measured before the first step may not change
DRAWN = {"accelerator_config": {"use_seedable_sampler": False}}
GALORE = {"optimizer": "galore_adamw", "rank": 8, "update_proj_gap": 3}
WAYS = {
    "lora": {**LORA, **DRAWN},
    "lora packed, bfloat16": {**LORA, "packing": True, "dtype": "bfloat16"},
    "galore": GALORE,
    "galore packed": {**GALORE, "packing": True},
    "8-bit": {"optimizer": "galore_adamw_8bit", "rank": 8},
}


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if name in ("galore", "8-bit") else ()) for name in WAYS]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(name, short, tmp_path, metrics):
    whole, config = tmp_path / "run", short(**WAYS[name])
    assert main([config]) == 0
    first = checkpoints.checkpoints(whole)[-1].name
    broken = interrupt(whole, tmp_path / "again", keep=first)
    assert main([config, "--output_dir", str(broken), "--resume_from_checkpoint", "true"]) == 0
    one, other = metrics(whole), metrics(broken)
    assert (one["steps"], first) == (8, "checkpoint-3")
    for key in ("history", "validation_loss", "validation_loss_before", "forgetting_loss", "forgetting_loss_before"):
        assert other[key] == one[key], key
    assert same(weights(broken), weights(whole))
    if "adapter" in WAYS[name]:
        assert same(adapter(broken), adapter(whole))


def test_a_run_that_learns_answers_through_a_pipeline_and_tells_what_it_forgot(short, tmp_path, metrics, capsys):
    """All weights, of conversations that it sees again and again; the pipeline stops where the model ends its turn."""
    seen = write(tmp_path / "seen.jsonl", [{"messages": conversation(i)} for i in range(4)])
    config = short(
        dataset=seen, validation_dataset=seen, max_steps=120, learning_rate=0.004, optimizer="adamw", save_strategy="no"
    )
    assert main([config]) == 0
    told, table = metrics(tmp_path / "run"), capsys.readouterr().out
    assert told["validation_loss"] < 0.1 < 4 < told["validation_loss_before"]
    assert told["forgetting_loss"] > told["forgetting_loss_before"]
    assert told["trainable_parameters"] == told["parameters"]
    for words in ("before,", "loss on other data", "plain AdamW", "4 blocks of at most 96 tokens"):
        assert words in table
    answer = transformers.pipeline("text-generation", model=str(tmp_path / "run"))
    for i in range(3):
        asked, expected = conversation(i)[:2]
        said = answer([asked], max_new_tokens=30, do_sample=False)[0]["generated_text"]
        assert said[-1] == expected


def test_the_merged_model_is_the_trained_one_and_the_adapter_is_pefts(short, tmp_path, base, metrics):
    assert main([short(**LORA, max_steps=4)]) == 0
    run = tmp_path / "run"
    merged = AutoModelForCausalLM.from_pretrained(run)
    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter").eval()
    untouched = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(40).view(2, 20)
    one, other, before = (model(ids).logits for model in (merged, tuned, untouched))
    assert torch.allclose(one, other, atol=1e-5)
    assert (one - before).abs().max() > 0.01
    told = metrics(run)
    assert told["trainable_parameters"] == sum(p.numel() for p in adapter(run).values())
    assert told["gradient_bytes"] == 4 * told["trainable_parameters"]
    assert told["validation_loss"] < told["validation_loss_before"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    assert tokenizer.chat_template == TEMPLATES["zephyr"]
    assert merged.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_saved_adapter_is_trained_on(short, tmp_path, metrics):
    assert main([short(**LORA, max_steps=4)]) == 0
    first = metrics(tmp_path / "run")
    more = short(adapter_from=str(tmp_path / "run" / "adapter"), max_steps=4, output_dir=str(tmp_path / "more"))
    assert main([more]) == 0
    second = metrics(tmp_path / "more")
    assert math.isclose(second["validation_loss_before"], first["validation_loss"], rel_tol=1e-5)
    assert second["validation_loss"] < first["validation_loss"]


def test_the_loss_is_a_mean_over_tokens_whatever_the_batches_are(short, tmp_path, metrics):
    for name, size in (("run", 1), ("five", 5)):
        config = short(max_steps=2, output_dir=str(tmp_path / name), per_device_eval_batch_size=size)
        assert main([config]) == 0
    one, other = metrics(tmp_path / "run"), metrics(tmp_path / "five")
    for key in ("validation_loss", "forgetting_loss_before"):
        assert math.isclose(one[key], other[key], rel_tol=1e-5)


@pytest.mark.parametrize("method", ["ia3", "prompt_tuning"])
def test_an_adapter_of_another_kind_is_saved_merged_or_alone(method, short, tmp_path, metrics, base, capsys):
    given = {"num_virtual_tokens": 4} if method == "prompt_tuning" else {}
    assert main([short(adapter=method, adapter_args=given, max_steps=3)]) == 0
    run, alone = tmp_path / "run", method == "prompt_tuning"
    assert (run / "model.safetensors").exists() != alone
    assert ("merges into no weights" in capsys.readouterr().out) == alone
    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    assert type(tuned.peft_config["default"]).__name__.lower().startswith(method.replace("_", ""))
    assert metrics(run)["validation_loss"] < metrics(run)["validation_loss_before"]


@pytest.mark.parametrize("way", [LORA, {}], ids=["lora", "all"])
def test_classes_are_told_apart(way, short, tmp_path, metrics):
    words = {"good": "You are welcome, ", "bad": "asks: what is "}
    rows = [{"text": f"{words[k]}{NAMES[i % 4]}", "label": k} for i in range(40) for k in words]
    file = write(tmp_path / "classes.jsonl", rows)
    config = short(dataset=file, format="label", forgetting_dataset=None, chat_template=None, **way, max_steps=20)
    assert main([config]) == 0
    told = metrics(tmp_path / "run")
    assert told["validation_accuracy"] == 1.0 > told["validation_accuracy_before"]
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "run"))
    assert [classify(words[k] + "Cy")[0]["label"] for k in words] == list(words)


def test_four_bits_lie_beneath_an_adapter_and_are_merged_whole(short, tmp_path, metrics):
    pytest.importorskip("bitsandbytes")
    assert main([short(**LORA, quantize="4bit", max_steps=4)]) == 0
    told = metrics(tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert told["validation_loss"] < told["validation_loss_before"]
    assert told["weight_bytes"] < 4 * told["parameters"]


def test_an_evaluation_leaves_layers_in_four_bits_as_they_are(short):
    """Some CPUs would lay them out anew, and no gradient would pass through them any more."""
    pytest.importorskip("bitsandbytes")
    config = load_settings(FinetuneConfig, [short(**LORA, quantize="4bit")])
    layer = load_base(config, ()).model.layers[0].self_attn.q_proj

    def gradient():
        x = torch.ones(3, 64, requires_grad=True)
        layer.train()(x).square().sum().backward()
        return x.grad

    before = gradient()
    with torch.no_grad():
        layer.eval()(torch.ones(3, 64))
    assert before is not None
    assert torch.equal(gradient(), before)


def test_attention_is_computed_as_it_is_said_and_packing_is_checked_with_it(short, refused, metrics, tmp_path):
    assert main([short(**LORA, packing=True, attn_implementation="eager", max_steps=2)]) == 0
    eager = metrics(tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["config"]["attn_implementation"] == "eager"
    again = short(**LORA, packing=True, max_steps=2, output_dir=str(tmp_path / "again"))
    assert main([again]) == 0
    assert metrics(tmp_path / "again")["validation_loss"] == pytest.approx(eager["validation_loss"], rel=1e-4)
    transformers.AttentionInterface.register("blind", blind)
    shutil.rmtree(tmp_path / "run")
    assert "the examples of a block see each other" in refused(attn_implementation="blind", packing=True)
    assert "has no attn_implementation 'spda' here" in refused(attn_implementation="spda")
    assert "is code on the hub, which is not run" in refused(attn_implementation="org/attention")


def blind(module, query, key, value, attention_mask, **keywords):
    """Attention that knows of no mask."""
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True).transpose(1, 2), None


def test_other_data_under_the_same_keys_is_refused_on_resume(short, tmp_path, capsys):
    config = short(**LORA, max_steps=3)
    assert main([config]) == 0
    write(tmp_path / "other.jsonl", [{"text": "something else"}] * 4)
    assert main([config, "--resume_from_checkpoint", "true", "--max_steps", "4"]) == 2
    assert "the data is not that of the run" in capsys.readouterr().err
    assert main([config, "--resume_from_checkpoint", "true", "--adapter_args.r", "8"]) == 2
    assert "adapter_args is" in capsys.readouterr().err


def test_run_yaml_is_a_configuration_that_runs_again(short, tmp_path, metrics):
    assert main([short(**LORA, max_steps=2)]) == 0
    assert main([str(tmp_path / "run" / "run.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert metrics(tmp_path / "again")["history"] == metrics(tmp_path / "run")["history"]
    events = [json.loads(line)["event"] for line in (tmp_path / "again" / "history.jsonl").read_text().splitlines()]
    assert events == ["started", "finished"]
