"""Input of a fine-tuning that cannot be used: one line on stderr, exit code 2, and nothing written."""

import json

import pytest
from conversations import conversation, save_base, write

from gracile.train.finetune import main

# What is said of each: keys of the configuration, further words of the command line, words of the line.
KEYS = {
    "no model": ({"model": None}, [], ["model is not set", "--model"]),
    "no dataset": ({"dataset": None}, [], ["dataset is not set", "--dataset"]),
    "a dataset twice": ({"dataset": ["a.jsonl", "a.jsonl"]}, [], ["a.jsonl", "each once"]),
    "a model that is not there": ({"model": "runs/nothing"}, [], ["runs/nothing", "does not exist"]),
    "a size": ({"model": "2m"}, [], ["model '2m'"]),
    "a key of pretraining": ({"layer": "sltrain"}, [], ["unknown key 'layer'"]),
    "a typo": ({"adaptor": "lora"}, [], ["unknown key 'adaptor'", "adapter"]),
    "no optimizer": ({"optimizer": "galor_adamw"}, [], ["galor_adamw", "galore_adamw"]),
    "an optimizer of layers": ({"optimizer": "sltrain_adamw"}, [], ["sltrain_adamw", "layers of its own"]),
    "no adapter": ({"adapter": "lora_x"}, [], ["unknown adapter 'lora_x'", "lora"]),
    "a field of no adapter": ({"adapter": "lora"}, ["--adapter_args.rank", "4"], ["lora takes no 'rank'"]),
    "a field with the nearest name": (
        {"adapter": "lora", "adapter_args": {"lora_alfa": 4}}, [], ["'lora_alfa'", "'lora_alpha'"],
    ),
    "targets among the fields": (
        {"adapter": "lora", "adapter_args": {"target_modules": ["q_proj"]}}, [], ["target_modules", "key of the run"],
    ),
    "factors that would be lost": (
        {"adapter": "lorasb", "adapter_args": {"save_projection": False}}, [], ["save_projection", "gradients"],
    ),
    "a value that peft refuses": ({"adapter": "lora", "adapter_args": {"r": 0}}, [], ["adapter lora", "0"]),
    "ranks that move": ({"adapter": "adalora", "adapter_args": {"total_step": 8}}, [], ["adalora", "checkpoint"]),
    "fields without an adapter": ({"adapter_args": {"r": 4}}, [], ["adapter_args", "need an adapter"]),
    "two adapters": ({"adapter": "lora", "adapter_from": "x"}, [], ["adapter and adapter_from"]),
    "a folder without an adapter": ({"adapter_from": "."}, [], ["adapter_config.json"]),
    "targets that match nothing": ({"adapter": "lora", "target_modules": ["qproj"]}, [], ["'qproj'", "q_proj"]),
    "targets of an optimizer": (
        {"optimizer": "galore_adamw", "rank": 4, "target_modules": ["qproj"]}, [], ["'qproj'", "q_proj"],
    ),
    "rank above the sides": ({"optimizer": "galore_adamw", "rank": 65}, [], ["rank is 65", "at most 64"]),
    "4 bits of all weights": ({"quantize": "4bit"}, [], ["quantize 4bit", "give an adapter"]),
    "3 bits": ({"quantize": "3bit", "adapter": "lora"}, [], ["quantize must be 4bit", "3bit"]),
    "format": ({"format": "chat"}, [], ["format must be one of", "'chat'"]),
    "too_long": ({"too_long": "truncate"}, [], ["too_long must be one of refuse, drop, cut", "'truncate'"]),
    "packed classes": ({"format": "label", "packing": True}, [], ["packing", "classification"]),
    "a cache beside packing": ({"packing": True, "use_cache": True}, [], ["packing needs use_cache: false"]),
    "validation_examples": ({"validation_examples": 0}, [], ["validation_examples must be at least 1"]),
    "positions": ({"block_size": 4096}, [], ["block_size is 4096", "1024 positions"]),
    "no template": ({"chat_template": None}, [], ["needs a chat template", "zephyr"]),
    "a template's name": ({"chat_template": "chatlm"}, [], ["chat_template 'chatlm'", "chatml"]),
    "a template without its token": ({"chat_template": "chatml"}, [], ["<|im_end|>", "zephyr"]),
    "messages end to end": ({"chat_template": "none"}, [], ["messages", "chat_template none"]),
    "too long": ({"block_size": 16}, [], ["row 1 has", "block_size=16", "too_long"]),
    "a column that is not there": ({"format": "prompt"}, [], ["no column 'prompt'", "prompt_column"]),
    "labels that are not there": ({"format": "label"}, [], ["no column 'text'", "label_column"]),
    "forgetting that is not there": ({"forgetting_dataset": "/no/where.jsonl"}, [], ["/no/where.jsonl"]),
    "encoding": ({"encoding": "utf-99"}, [], ["encoding 'utf-99'"]),
    "schedule": ({"adapter": "lora", "lr_scheduler_type": "cosine_with_min_lr"}, [], ["lr_scheduler"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_a_value_is_refused_in_one_line(name, refused):
    changes, words, said = KEYS[name]
    line = refused(*words, **changes)
    assert all(word in line for word in said), line


ASKED = {"role": "user", "content": "hello"}
GOOD = [{"messages": conversation(i)} for i in range(12)]
# What is written as a data set, and words of the line.
FILES = {
    "no JSON": ('{"messages": [\n', ["line 1 is not JSON"]),
    "a list": ('["a"]\n', ["not an object"]),
    "empty": ("", ["holds no rows"]),
    "other columns": ([{"question": "a", "answer": "b"}], ["question, answer", "prompt_column"]),
    "messages of text": ([*GOOD, {"messages": "hello"}], ["row 13", "messages must be a list"]),
    "a message without a role": ([{"messages": [{"content": "a"}]}], ["row 1", "role and content"]),
    "a message of parts": (
        [{"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}], ["row 1", "both texts"],
    ),
    "nobody answers": ([*GOOD, {"messages": [ASKED]}], ["row 13", "no message has the role assistant"]),
    "one row": (GOOD[:1], ["1 example(s)", "validation_dataset"]),
    "nothing to learn": ([{"messages": []}] * 3, ["no example of 3 rows"]),
    "prompts of numbers": ([{"prompt": 1, "response": "a"}], ["row 1", "prompt must be a text"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_refused_in_one_line(name, refused, tmp_path):
    text, said = FILES[name]
    file = tmp_path / "bad.jsonl"
    file.write_text(text if isinstance(text, str) else "".join(json.dumps(row) + "\n" for row in text))
    line = refused(dataset=str(file))
    assert all(word in line for word in said), line


def test_labels_that_do_not_fit_are_refused(refused, tmp_path):
    one = write(tmp_path / "one.jsonl", [{"text": f"a {i}", "label": "good"} for i in range(20)])
    line = refused(dataset=one, format="label", forgetting_dataset=None)
    assert "1 class(es)" in line
    two = write(tmp_path / "two.jsonl", [{"text": f"a {i}", "label": "gb"[i % 2]} for i in range(20)])
    line = refused(dataset=two, format="label", validation_dataset=one, forgetting_dataset=None)
    assert "the label 'good'" in line


def test_four_bits_of_odd_widths_are_refused_on_a_cpu(refused, tmp_path):
    odd = save_base(tmp_path / "odd", intermediate_size=96)
    assert "down_proj has 96 inputs" in refused(model=odd, adapter="lora", quantize="4bit")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused_and_nothing_resized(refused, tmp_path):
    folder = tmp_path / "other"
    save_base(folder)
    entries = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    entries["added_tokens"] += [
        {**entries["added_tokens"][0], "id": 390 + i, "content": f"<new{i}>"} for i in range(200)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(entries), encoding="utf-8")
    line = refused(tokenizer=str(folder))
    assert "the model embeds 400" in line


def test_a_recipe_of_another_command_is_refused(capsys):
    assert main(["quickstart"]) == 2
    assert "quickstart is a recipe of gracile pretrain, and not of finetune" in capsys.readouterr().err


def test_help_has_every_key_and_no_layers(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for key in ("--adapter_args", "--forgetting_dataset", "--chat_template", "--too_long", "--optimizer_args"):
        assert key in text
    assert "--layer" not in text
    assert "--teacher" not in text
    assert "gracile finetune --help-all" in text
