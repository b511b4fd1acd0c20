"""``gracile memory`` and ``gracile profile`` of fine-tunings: what a config.json alone tells is what is held."""

import json
import math
import shutil

import peft
import pytest
from conversations import save_base
from transformers import AutoConfig, AutoModelForCausalLM

from gracile.train import memory, profile
from gracile.train.build.trainee import NewModel, TunedModel, trainee_of
from gracile.train.config.which import load_either
from gracile.train.measurement.planner import Planner

EXACT = ("frozen weights", "weights", "gradients", "moments", "projectors", "error buffers", "indices")
WAYS = {
    "lora": {"adapter": "lora", "adapter_args": {"r": 4, "lora_dropout": 0.1}},
    "sorsa": {"adapter": "sorsa", "adapter_args": {"r": 4}},
    "loraxs, bfloat16": {"adapter": "loraxs", "adapter_args": {"r": 4}, "dtype": "bfloat16"},
    "soka": {"adapter": "soka", "adapter_args": {"r": 4}},
    "s2ft": {"selection": "s2ft", "selection_args": {"down_ratio": 0.25}},
    "hft, galore packed": {"selection": "hft", "optimizer": "galore_adamw", "rank": 4, "packing": True},
    "galore": {"optimizer": "galore_adamw", "rank": 8},
}


def told(command, capsys, *words):
    """What a command says as JSON."""
    capsys.readouterr()
    assert command.main([*words, "--json"]) == 0
    out = capsys.readouterr().out
    return json.loads(out[out.index("{\n") :])


def line(command, capsys, *words):
    """The one line with which a command refuses."""
    capsys.readouterr()
    assert command.main(list(words)) == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("gracile ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def bare(base, tmp_path):
    """The folder of a model without its weights."""
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return str(tmp_path / "bare")


# ---- planned is measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough if name.startswith("hft") else ()) for name in WAYS]
)
def test_the_plan_is_what_is_measured(name, short, capsys):
    found = told(profile, capsys, short(**WAYS[name]), "--steps", "1")
    planned, measured = found["planned"], found["measured"]
    assert {kind: planned[kind] for kind in EXACT} == {kind: measured[kind] for kind in EXACT}
    assert planned["weights"] > 0 < planned["moments"]
    assert (planned["frozen weights"] > 0) == ("adapter" in WAYS[name] or "selection" in WAYS[name])
    for plan, seen in ((planned, measured), (found["at_peak"]["planned"], found["at_peak"]["measured"])):
        assert seen["activations"] == pytest.approx(plan["activations"], rel=0.1)


def test_a_base_in_four_bits_is_planned_with_its_scales(short, capsys):
    pytest.importorskip("bitsandbytes")
    config = short(**WAYS["lora"], quantize="4bit", packing=True)
    found = told(profile, capsys, config, "--steps", "1")
    planned, measured = found["planned"], found["measured"]
    assert {kind: planned[kind] for kind in EXACT} == {kind: measured[kind] for kind in EXACT}
    assert measured["activations"] == pytest.approx(planned["activations"], rel=0.1)
    whole = told(memory, capsys, short(**WAYS["lora"]))["optimizers"]["adamw"]["held"]
    assert planned["frozen weights"] < whole["frozen weights"] / 1.9


def test_the_shares_of_small_weights_are_planned_by_the_formula(short, capsys):
    config = short(selection="sara", selection_args={"share": 0.125})
    found = told(profile, capsys, config, "--steps", "1")
    for kind in ("moments", "indices"):
        assert found["measured"][kind] == pytest.approx(found["planned"][kind], rel=0.01) != 0, "sizes that tie"
    by_size = short(selection="sara", selection_args={"threshold": 0.01})
    said = line(memory, capsys, by_size)
    assert "only the weights tell; plan with a share in its place" in said
    assert told(memory, capsys, by_size, "--selection_args", '{"share": 0.1}')["trained"] > 0


# ---- nothing is read or allocated -----------------------------------------------------------------------------------


def test_a_config_json_is_enough(bare, tmp_path, capsys):
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bare))
    parameters = sum(p.numel() for p in base.parameters())
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    saved = ["--model", bare, "--adapter_from", str(tmp_path / "adapter")]
    compared = ["--compare", "adamw,galore_adamw", "--rank", "2", "--target_modules", "attn"]
    found = told(memory, capsys, *saved, *compared)
    assert found["trained"] == 2 * 2 * 4 * (64 + 64)
    assert found["parameters"] == parameters
    adamw, galore = found["optimizers"]["adamw"], found["optimizers"]["galore_adamw"]
    assert adamw["held"]["moments"] > galore["held"]["moments"]
    budget = told(memory, capsys, *saved, "--seq_len", "32", "--budget", "2MiB")["optimizers"]["adamw"]
    assert budget["largest_micro_batch"]["checkpointed"] > budget["largest_micro_batch"]["plain"] > 1


def test_a_large_model_is_planned_and_split(tmp_path, capsys):
    """Billions of weights, of a folder with one file."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "vocab_size": 32000}
    config |= {"hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    keys = ["--model", str(tmp_path), "--adapter", "lora", "--dtype", "bfloat16", "--adapter_args.r", "16"]
    alone = told(memory, capsys, *keys, "--gpu", "24GB")["optimizers"]["adamw"]["held"]
    split = told(memory, capsys, *keys, "--zero", "3", "--world_size", "4")["optimizers"]["adamw"]["held"]
    assert alone["frozen weights"] > 4e9
    assert alone["weights"] < 2**25
    for kind in ("frozen weights", "moments"):
        assert split[kind] == pytest.approx(alone[kind] / 4, rel=0.01)


def test_the_table_tells_frozen_from_trained(bare, tmp_path, capsys):
    picture = tmp_path / "plan.png"
    assert memory.main(["--model", bare, "--adapter", "lora", "--gpu", "24GB", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "133,440 parameters in float32; lora, 17,408 trained; 8 x 512 tokens" in out
    assert "\n  frozen weights" in out
    assert "\n  trained weights" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("format", ["text", "label"])
def test_examples_are_planned_padded_and_so_are_classes(format, bare):
    config = load_either(["--model", bare, "--adapter", "lora", "--format", format], None, needs_output_dir=False)
    plan = Planner(config).plan("adamw", 2, checkpointing=False)
    assert math.isfinite(plan.peak)
    assert plan.held["activations"] > 0


# ---- which configuration it is --------------------------------------------------------------------------------------


def test_a_key_of_one_command_alone_decides(bare, tiny, short):
    def kind(*words):
        return type(trainee_of(load_either(words, None, needs_output_dir=False)))

    assert kind(tiny()) is NewModel
    assert kind() is NewModel, "the quickstart"
    assert kind("--model", "9m") is NewModel
    assert kind(short()) is TunedModel, "chat_template"
    assert kind("--model", bare, "--layer", "low_rank", "--optimizer", "adamw") is NewModel
    assert kind("--model", bare, "--adapter_args.r", "4", "--adapter", "lora") is TunedModel
    assert kind("--packing=true", "--model", bare, "--quantize", "4bit", "--adapter", "lora") is TunedModel


def test_what_does_not_decide_is_one_line(bare, tmp_path, capsys):
    either = tmp_path / "either.yaml"
    either.write_text(f"model: {bare}\nblock_size: 32\n")
    said = line(memory, capsys, str(either))
    assert "could be of gracile pretrain or of gracile finetune: no key of one of them alone is in it" in said
    assert told(memory, capsys, str(either), "--command", "finetune")["optimizers"].keys() == {"adamw"}
    assert told(memory, capsys, str(either), "--command", "pretrain")["optimizers"].keys() == {"galore_adamw"}
    said = line(memory, capsys, str(either), "--layer", "low_rank", "--adapter", "lora")
    assert "layer, a key of gracile pretrain and adapter, a key of gracile finetune; leave one of them out" in said
    assert "command must be one of pretrain, finetune, got 'tune'" in line(memory, capsys, "--command", "tune")
    assert "unknown key 'adaptr'" in line(profile, capsys, str(either), "--adaptr", "lora")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "boft"], "adapter boft: it looks at weights when it is made, so that it cannot be planned"),
        (["--adapter", "lora", "--zero", "3", "--quantize", "4bit"], "quantize 4bit needs whole weights"),
        (["--selection", "hft", "--zero", "3"], "selection hft chooses from whole weights"),
        (["--selection", "s2ft", "--compare", "galore_adamw"], "selection s2ft is moved by AdamW"),
        (["--selection", "hft", "--compare", "sltrain_adamw"], "optimizer sltrain_adamw trains layers of its own"),
        (["--adapter", "lora", "--model", "hub:no/such"], "model 'hub:no/such' cannot be loaded"),
        (["--adapter", "lora", "--block_size", "9999999"], "block_size is 9999999 but the model has"),
        (["--adapter", "lora", "--selection_args", "5"], "selection_args must be a mapping such as"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, message, bare, capsys):
    model = [] if "--model" in words else ["--model", bare]
    assert message in line(memory, capsys, *model, *words)


def test_a_recipe_whose_model_is_not_there_says_what_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = line(memory, capsys, "finetune_quickstart")
    assert "run `gracile pretrain quickstart` first, which writes it" in said
    save_base(tmp_path / "runs" / "quickstart")
    found = told(memory, capsys, "finetune_quickstart", "--micro_batch", "2")
    assert (found["micro_batch"], found["seq_len"]) == (2, 128)
    assert found["trained"] == found["parameters"]
