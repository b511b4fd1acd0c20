"""Pretrain a small LLaMA on bytes of Python's own source: ``python trainer_causal_lm.py OUTPUT_DIR [CHECKPOINT]``.

Nothing is downloaded. The Trainer builds the optimizer from its class, on groups of its own.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

SEED, BLOCK = 0, 32

text = Path(argparse.__file__).read_bytes()
blocks = torch.tensor(list(text[: len(text) // BLOCK * BLOCK])).view(-1, BLOCK)
dataset = [{"input_ids": block, "labels": block} for block in blocks]

torch.manual_seed(SEED)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=BLOCK,
    tie_word_embeddings=True,
)
model = LlamaForCausalLM(config)

OPTIMIZER = torch.optim.AdamW, {"lr": 0.01}  # the line to change

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=sys.argv[1],
        max_steps=8,
        per_device_train_batch_size=8,
        weight_decay=0.01,
        warmup_steps=1,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=5,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=SEED,
    ),
    train_dataset=dataset,
    optimizer_cls_and_kwargs=OPTIMIZER,
)
trainer.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
print(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
