"""The Hugging Face Trainer with an optimizer handed over, and resumed from its checkpoint.

    python trainer_optimizers.py [OUTPUT_DIR]

Trains a small LLaMA on bytes of Python's own source text; nothing is downloaded.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from gracile.models import build_llama
from gracile.optim import APOLLOAdamW, param_groups

BLOCK = 64
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}

text = Path(argparse.__file__).read_bytes()
blocks = torch.tensor(list(text[: len(text) // BLOCK * BLOCK])).view(-1, BLOCK)
dataset = [{"input_ids": block, "labels": block} for block in blocks]


def trainer_in(output_dir):
    torch.manual_seed(0)
    model = build_llama("2m", vocab_size=256, **SMALL)
    groups = param_groups(model, rank=8, target_modules=["attn", "mlp"], weight_decay=0.0)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=20,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=10,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,  # remove this line where there is a GPU
        seed=0,
    )
    # None: the Trainer makes the learning rate's schedule for this optimizer
    return Trainer(model, arguments, train_dataset=dataset, optimizers=(APOLLOAdamW(groups, lr=0.01), None))


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


output_dir = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="gracile-"))
whole = trainer_in(output_dir / "whole")
whole.train()
resumed = trainer_in(output_dir / "resumed")
resumed.train(resume_from_checkpoint=str(output_dir / "whole" / "checkpoint-10"))

losses = losses_of(whole)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {whole.state.global_step} steps")
assert losses[-1] < 0.8 * losses[0]
assert losses_of(resumed) == losses, "the resumed run must equal the uninterrupted one"
assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
print("resumed from checkpoint-10 to the same bits")
