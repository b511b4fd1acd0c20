import dataclasses
import re
from importlib import resources

import pytest
import yaml

from gracile.registry import LAYERS, OPTIMIZERS
from gracile.train.cli import main as gracile
from gracile.train.config.arguments import (
    DataArguments,
    ModelArguments,
    OptimizerArguments,
    RunArguments,
)
from gracile.train.config.finetune_arguments import FinetuneConfig
from gracile.train.config.help_text import COMMON, HERE, usage
from gracile.train.config.parser import NOT_READ, load_config, load_settings
from gracile.train.errors import BadInput

FILES = (p.name for p in resources.files("gracile.configs").iterdir() if p.name.endswith(".yaml"))
EMBEDDED = sorted(name.removesuffix(".yaml") for name in FILES if not name.startswith("finetune_"))


def test_command_line_overrides_yaml(tiny):
    config = load_config([tiny(), "--rank", "7", "--max-steps=3", "--target_modules", "q_proj", "v_proj"])
    assert config.optimizer.rank == 7
    assert config.run.max_steps == 3
    assert config.optimizer.target_modules == ["q_proj", "v_proj"]
    assert config.optimizer.update_proj_gap == 4, "from the file"


def test_yaml_reads_1e_3_as_a_string_and_it_still_is_a_number(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-3\noutput_dir: o\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\nbf16: false\n")
    config = load_config([str(path)])
    assert config.run.learning_rate == 1e-3
    assert config.run.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_mappings_are_read_once_wherever_they_come_from(tiny):
    config = load_config([tiny(), "--optimizer_args", '{"state_dtype":"bfloat16"}'])
    assert config.model.model_overrides["hidden_size"] == 32, "from the file"
    assert config.optimizer.optimizer_args == {"state_dtype": "bfloat16"}
    assert config.model.layer_args is None
    assert config.resolved()["optimizer_args"] == '{"state_dtype": "bfloat16"}', "JSON text, which YAML can hold"


@pytest.mark.parametrize("text", ["8bit", "[1, 2]", '{"a": }'])
@pytest.mark.parametrize("key", ["model_overrides", "layer_args", "optimizer_args"])
def test_what_is_no_mapping_gets_one_line(tiny, key, text):
    with pytest.raises(BadInput) as error:
        load_config([tiny(), f"--{key}", text])
    assert re.fullmatch(rf"{key} must be a mapping such as {{.*}}, got {re.escape(text)}", str(error.value))


def test_without_a_file_the_quickstart_is_the_default():
    assert load_config([]).resolved() == load_config(["quickstart"]).resolved()


def test_resolved_configuration_reproduces_itself(tiny, tmp_path):
    first = load_config([tiny(), "--rank", "3"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(first.resolved()))
    assert load_config([str(tmp_path / "again.yaml")]).resolved() == first.resolved()


def test_another_optimizer_than_a_recipes_has_its_own_defaults(tmp_path, capsys):
    """But for keys that are given, and in a file of one's own, where every key is."""
    out = ["--output_dir", str(tmp_path / "run")]
    config = load_config(["llama_60m_galore", "--optimizer", "apollo_adamw", *out])
    assert (config.optimizer.scale, config.optimizer.update_proj_gap) == (None, None)
    assert config.optimizer.rank == load_config(["llama_60m_galore", *out]).optimizer.rank
    assert set(config.left_out) >= {"scale", "update_proj_gap"}
    given = load_config(["llama_60m_galore", "--optimizer=apollo_adamw", "--scale", "0.5", *out])
    assert (given.optimizer.scale, given.optimizer.update_proj_gap) == (0.5, None)
    same = load_config(["llama_60m_galore", "--optimizer", "galore_adamw", *out])
    assert (same.optimizer.scale, same.left_out) == (0.25, ())
    own = tmp_path / "own.yaml"
    own.write_text("model: 2m\noptimizer: galore_adamw\nscale: 0.25\nrank: 8\n")
    assert load_config([str(own), "--optimizer", "apollo_adamw", *out]).optimizer.scale == 0.25


@pytest.mark.parametrize("part", [["--adapter", "lora"], ["--adapter_from=saved"], ["--selection", "s2ft"]])
def test_a_part_of_a_model_is_trained_without_a_recipes_optimizer_for_all_of_it(part):
    config = load_settings(FinetuneConfig, ["finetune_quickstart", *part])
    assert (config.optimizer.optimizer, config.optimizer.rank) == ("adamw", 128)  # which has no effect
    assert set(config.left_out) == {"optimizer", "rank", "update_proj_gap", "scale"}
    chosen = load_settings(FinetuneConfig, ["finetune_quickstart", *part, "--optimizer", "galore_adamw"])
    assert (chosen.optimizer.optimizer, chosen.optimizer.rank, chosen.left_out) == ("galore_adamw", 32, ())
    assert load_settings(FinetuneConfig, ["finetune_quickstart"]).optimizer.rank == 32


def test_betas_and_eps_that_are_not_given_are_the_optimizers_own(tmp_path):
    """And not those of AdamW, which ``TrainingArguments`` has."""

    def told(*argv):
        run = load_config([*argv, "--output_dir", str(tmp_path)]).run
        return run.adam_beta1, run.adam_beta2, run.adam_epsilon

    for recipe in ("quickstart", "llama_60m_galore"):
        assert told(recipe, "--optimizer", "ldadamw") == (0.908, 0.99, 1e-8)
        assert told(recipe, "--optimizer", "lion")[:2] == (0.9, 0.99)
        assert told(recipe, "--optimizer", "fira_adamw") == (0.9, 0.999, 1e-6)
        assert told(recipe, "--optimizer", "adamw") == (0.9, 0.999, 1e-8)
        assert told(recipe, "--optimizer", "ldadamw", "--adam_beta2", "0.95") == (0.908, 0.95, 1e-8)
    own = tmp_path / "own.yaml"
    own.write_text("model: 2m\noptimizer: ldadamw\nadam_epsilon: 1e-7\n")
    assert told(str(own)) == (0.908, 0.99, 1e-7)


# Whose steps are as large as fits there.
ON_A_CARD = [f"llama_7b_{name}" for name in ("galore_24gb", "q_galore_16gb", "q_apollo_12gb")]


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_embedded_configuration_is_valid(name, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    config = load_config([name])
    assert config.run.output_dir == f"runs/{name}"
    if name.startswith("llama") and name not in ON_A_CARD:
        run = config.run
        assert run.per_device_train_batch_size * run.gradient_accumulation_steps * config.data.block_size == 131_072


def test_the_papers_sizes_have_recipes():
    sizes = ("60m", "130m", "350m", "1b", "7b")
    others = ["quickstart", "quickstart_2_4_cast", "quickstart_2_4_sr_ste", "quickstart_maestro"]
    others += ["quickstart_autosparse", "quickstart_hyper_sparse", "quickstart_wgsef"]
    others += [f"quickstart_{name}" for name in ("doped", "factorised", "parallel", "wide")]
    others += ["quickstart_spdf_dense", "quickstart_spdf_sparse"]
    others += [f"llama_60m_{name}" for name in ("relora", "low_rank", "scale", "gradnormlorp")]
    others += [f"llama_130m_{name}" for name in ("sst", "blast", "rigl")]
    others += [f"llama_350m_{name}" for name in ("ldadam", "dct")]
    others += ON_A_CARD
    methods = ("adamw", "galore", "sltrain", "apollo", "apollo_mini", "fira", "q_galore")
    assert sorted([*others, *(f"llama_{s}_{o}" for s in sizes for o in methods)]) == EMBEDDED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rnk", "4"], ["rnk", "command line", "did you mean 'rank'"]),
        (["--rank", "2.5"], ["rank", "2.5", "whole number"]),
        (["--learning_rate", "fast"], ["learning_rate", "fast", "a number"]),
        (["--bf16", "perhaps"], ["bf16", "perhaps"]),
        (["stray"], ["stray"]),
        (["--deepspeed", "nowhere.json"], ["deepspeed", "nowhere.json", "does not exist"]),
        (["--eval_strategy", "sometimes"], ["sometimes"]),
    ],
)
def test_bad_command_line(tiny, arguments, words):
    with pytest.raises(BadInput) as error:
        load_config([tiny(), *arguments])
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rnak: 4\noutput_dir: o\n", ["rnak", "did you mean 'rank'"]),
        ("- a\n- b\n", ["key: value"]),
        ("a: [\n", ["not YAML"]),
        ("rank: 4\n", ["output_dir"]),
        ("!!python/object/apply:os.system ['true']\n", ["not YAML"]),
    ],
)
def test_bad_file(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(BadInput) as error:
        load_config([str(tmp_path / "bad.yaml")])
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_configuration_that_does_not_exist_names_the_nearest():
    with pytest.raises(BadInput, match="llama_60m_galore"):
        load_config(["lama_60m_galor"])


def test_help_names_every_key_of_ours_and_the_common_ones():
    text = usage()
    ours = [f.name for group in (ModelArguments, DataArguments, OptimizerArguments) for f in dataclasses.fields(group)]
    for name in [*COMMON, *ours, "evaluate_at"]:
        assert f"--{name} " in text or f"--{name}\n" in text
    assert max(len(line) for line in text.splitlines()) <= 110
    assert all(f"  {entry.name} " in text for entry in (*OPTIMIZERS.values(), *LAYERS.values()))
    assert OPTIMIZERS["galore_adamw"].summary in " ".join(text.split())
    everything = usage(everything=True)
    told = dict(re.findall(r"^  --(\w+)\s+(\S.+)", everything, re.MULTILINE))
    assert {f.name for f in dataclasses.fields(RunArguments) if f.init} - NOT_READ.keys() == told.keys() - set(ours)
    assert all(re.search(r"[A-Za-z]{3}", text) for text in told.values()), "a word for each"
    assert told["adam_beta2"].endswith("of its constructor."), "and not the Trainer's default"
    assert max(len(line) for line in everything.splitlines()) <= 110
    assert HERE.keys() <= {f.name for f in dataclasses.fields(RunArguments) if f.init} - COMMON.keys()


def test_the_help_of_optimizer_names_every_one_of_them():
    (described,) = (f for f in dataclasses.fields(OptimizerArguments) if f.name == "optimizer")
    assert set(re.findall(r"\w+", described.metadata["help"])) - {"or"} == set(OPTIMIZERS)


def test_cli_help_version_and_unknown_command(monkeypatch, capsys):
    for arguments, code, word in (
        (["--help"], 0, "pretrain"),
        (["--version"], 0, "gracile"),
        (["pretran"], 2, "'pretrain'"),
    ):
        monkeypatch.setattr("sys.argv", ["gracile", *arguments])
        assert gracile() == code
        out, err = capsys.readouterr()
        assert word in out + err
