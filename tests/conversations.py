"""A small saved model with a tokenizer, conversations to tune it on, and short runs of ``gracile finetune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gracile.models import build_llama

NAMES = ("Ada", "Bob", "Cy", "Dee")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def conversation(i: int) -> list[dict[str, str]]:
    """Two turns for every third; what is asked says the answer."""
    name, a, b = NAMES[i % 4], i % 7, i % 5
    turns = [(f"{name} asks: what is {a} plus {b}?", f"It is {a + b}."), ("Thanks!", f"You are welcome, {name}.")]
    chosen = turns if i % 3 == 0 else turns[:1]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in chosen for role, text in zip(roles, turn, strict=True)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """A jsonl file of ``rows``; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without a chat template; its specials are <pad>, <s> and </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [message["content"] for i in range(40) for message in conversation(i)]
    tokenizer.train_from_iterator([*texts, "<|user|>\n<|assistant|>\n" * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_base(folder: Path, **changes: int) -> str:
    """A model of 2 layers with its tokenizer, as a user has one."""
    torch.manual_seed(0)
    build_llama("2m", vocab_size=400, **{**SMALL, **changes}).save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    return str(folder)


def short_run(folder: Path, base: str, /, **changes: Any) -> str:
    """The path of a configuration of a run that takes a second or two; None takes a key away."""
    settings = {
        "model": base,
        "dataset": write(folder / "chat.jsonl", [{"messages": conversation(i)} for i in range(60)]),
        "forgetting_dataset": write(folder / "other.jsonl", [{"text": f"def f{i}(x): return x"} for i in range(9)]),
        "chat_template": "zephyr",
        "block_size": 96,
        "learning_rate": 0.01,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_steps": 3,
        "logging_steps": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "output_dir": str(folder / "run"),
    } | changes
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
    return str(path)
