"""Input that cannot be used: one line on stderr, exit code 2, and nothing written."""

import pytest

from gracile.train.pretrain import main

TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 400}

# What is said of each: keys of the configuration, further words of the command line, words of the line.
VALUES = {
    "seed below 0": ({"seed": -1}, [], ["seed", "-1"]),
    "seed above 32 bits": ({"seed": 2**32}, [], ["seed", str(2**32)]),
    "data_seed": ({"data_seed": -5}, [], ["data_seed", "-5"]),
    "output_dir empty": ({"output_dir": ""}, [], ["output_dir"]),
    "output_dir of spaces": ({}, ["--output_dir", "  "], ["output_dir"]),
    "report_to": ({"report_to": "wandb"}, [], ["report_to", "wandb"]),
    "push_to_hub": ({"push_to_hub": True}, [], ["push_to_hub"]),
    "rank above the sides": ({"rank": 64}, [], ["rank is 64", "at most 32"]),
    "positions": ({"block_size": 2048}, [], ["block_size is 2048", "1024 positions"]),
    "optim": ({}, ["--optim", "lion_32bit"], ["optim ", "--optimizer"]),
    "optim in the file": ({"optim": "galore_adamw_layerwise"}, [], ["optim ", "--optimizer"]),
    "optim_args": ({}, ["--optim_args", "rank=4"], ["optim_args", "optimizer_args"]),
    "a list where a name belongs": ({"model": ["2m", "b"]}, [], ["model", "one value", "['2m', 'b']"]),
    "a list where a number belongs": ({"max_steps": [1, 2]}, [], ["max_steps", "one value"]),
    "block size of BLaST": (
        {"optimizer": "block_sparse_adamw", "sparsity": 0.5, "rank": None},
        ["--optimizer_args.block_size", "7"],
        ["--optimizer_args.block_size", "7"],
    ),
    # of our own
    "rate below 0": ({"learning_rate": -0.1}, [], ["-0.1"]),
    "rate nan": ({"learning_rate": "nan"}, [], ["nan"]),
    "rate infinite": ({"learning_rate": "inf"}, [], ["inf"]),
    "decay below 0": ({"weight_decay": -1}, [], ["weight_decay", "-1"]),
    "beta above 1": ({"adam_beta1": 1.5}, [], ["1.5"]),
    "eps below 0": ({"adam_epsilon": -1e-8}, [], ["-1e-08"]),
    "warmup below 0": ({"warmup_steps": -3}, [], ["warmup_steps", "-3"]),
    "norm below 0": ({"max_grad_norm": -1}, [], ["max_grad_norm", "-1"]),
    "save_steps 0": ({"save_steps": 0}, [], ["save_steps", "0"]),
    "save_steps below 0": ({"save_steps": -2}, [], ["save_steps", "-2"]),
    "logging_steps 0": ({"logging_steps": 0}, [], ["logging_steps", "non-zero"]),
    "eval_steps 0": ({"eval_strategy": "steps", "eval_steps": 0}, [], ["eval_steps", "0"]),
    "save_total_limit 0": ({"save_total_limit": -1}, [], ["save_total_limit", "-1"]),
    "accumulation below 0": ({"gradient_accumulation_steps": -1}, [], ["gradient_accumulation_steps", "-1"]),
    "evaluation batch 0": ({"per_device_eval_batch_size": 0}, [], ["per_device_eval_batch_size", "0"]),
    "schedule": ({"lr_scheduler_type": "cosinus"}, [], ["cosinus"]),
    "schedule without its keyword": ({"lr_scheduler_type": "cosine_with_min_lr"}, [], ["lr_scheduler"]),
    "keyword of the schedule": ({"lr_scheduler_kwargs": {"min_lr": 1, "foo": 2}}, [], ["lr_scheduler"]),
    "schedule's keywords no mapping": ({"lr_scheduler_kwargs": "fast"}, [], ["lr_scheduler_kwargs", "fast"]),
    "evaluate_at below 1": ({"evaluate_at": [0]}, [], ["evaluate_at", "0"]),
    "workers": ({"dataloader_num_workers": -1}, [], ["dataloader_num_workers", "-1"]),
    "label smoothing": ({"label_smoothing_factor": 2}, [], ["label_smoothing_factor", "2"]),
    "epochs nan": ({"max_steps": -1, "num_train_epochs": "nan"}, [], ["num_train_epochs", "nan"]),
    "model empty": ({"model": "", "model_overrides": None}, [], ["model"]),
    "dataset empty": ({"dataset": ""}, [], ["dataset"]),
    "optimizer empty": ({"optimizer": ""}, [], ["optimizer"]),
    "layers 0": ({"model_overrides": TINY | {"num_hidden_layers": 0}}, [], ["num_hidden_layers"]),
    "width below 0": ({"model_overrides": TINY | {"hidden_size": -32}}, [], ["hidden_size", "-32"]),
    "vocabulary of text": ({"model_overrides": TINY | {"vocab_size": "many"}}, [], ["vocab_size", "many"]),
    "target a broken expression": ({"target_modules": ["(attn"]}, [], ["(attn"]),
    "sparsity above 1": ({"optimizer": "set_adamw", "sparsity": 1.5}, [], ["sparsity", "1.5"]),
    "drop_fraction": ({"optimizer": "set_adamw", "sparsity": 0.5, "drop_fraction": 2}, [], ["drop_fraction", "2"]),
    "state_dtype": ({"optimizer_args": {"state_dtype": "int4"}}, [], ["state_dtype", "int4"]),
    "a part without a value": ({}, ["--optimizer_args.state_dtype"], ["optimizer_args.state_dtype", "value"]),
    "a part of nothing": ({}, ["--rank.size", "3"], ["rank.size"]),
    "two files": ({}, ["other.yaml"], ["other.yaml"]),
    "a key without a value": ({}, ["--max_steps"], ["max_steps", "value"]),
    "bf16 of nothing": ({}, ["--bf16=maybe"], ["bf16", "maybe"]),
    "fp16 on a CPU": ({"fp16": True}, [], ["fp16"]),
    "deepspeed no json": ({"deepspeed": "{TMP}/bad.json"}, [], ["deepspeed"]),
    "no best model without evaluations": ({"load_best_model_at_end": True}, [], ["load_best_model_at_end"]),
    "distill": ({"distill": 1.5}, [], ["distill", "1.5"]),
    "validation_blocks": ({"validation_blocks": -1}, [], ["validation_blocks", "-1"]),
    "a key of a method": ({}, ["--error_feedback", "8bit"], ["--optimizer_args.error_feedback"]),
    "a key of a layer": ({}, ["--density", "0.1"], ["--layer_args.density", "--optimizer_args.density"]),
    "resume from a file": ({"resume_from_checkpoint": "{TMP}/bad.json"}, [], ["resume_from_checkpoint"]),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_cannot_be_used_is_one_line_and_nothing_is_written(tiny, tmp_path, capsys, monkeypatch, case):
    changes, more, words = VALUES[case]
    (tmp_path / "bad.json").write_text("{ no")
    filled = {k: v.replace("{TMP}", str(tmp_path)) if isinstance(v, str) else v for k, v in changes.items()}
    config = tiny(**filled)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert main([config, *more]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    (line,) = [text for text in err if text.startswith("gracile pretrain:")]
    assert line == err[-1]
    assert all(word in line for word in words), line
    assert set(tmp_path.rglob("*")) == before


FILES = {
    "not UTF-8": (b"model: caf\xe9\noutput_dir: run\n", ["not UTF-8", "byte 10 is 0xe9"]),
    "UTF-16": ("model: 2m\n".encode("utf-16"), ["not UTF-8"]),
    "a key twice": (b"model: 2m\nrank: 4\nrank: 8\noutput_dir: run\n", ["'rank' is there twice", "line 1"]),
    "a mapping's key twice": (b"model_overrides: {a: 1, a: 2}\noutput_dir: run\n", ["'a' is there twice"]),
    "a key that is a list": (b"? [a, b]\n: 1\n", ["not YAML"]),
    "an anchor without an end": (b"model: &a\n  *b\n", ["not YAML"]),
    "a control character": (b"model: 2\x00m\n", ["not YAML"]),
    "a tab": (b"model:\n\t2m\n", ["not YAML"]),
    "two documents": (b"model: 2m\n---\nmodel: 9m\n", ["not YAML"]),
    "a number": (b"7\n", ["key: value", "int"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, capsys, monkeypatch, case):
    text, words = FILES[case]
    (tmp_path / "c.yaml").write_bytes(text)
    monkeypatch.chdir(tmp_path)
    assert main(["c.yaml"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in ["c.yaml", *words]), line
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]
