"""The Hugging Face Trainer that builds the optimizer itself: by class and keywords, or in a subclass.

    python trainer_optimizer_class.py [OUTPUT_DIR]

Trains a small LLaMA on bytes of Python's own source text; nothing is downloaded.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from gracile.models import build_llama
from gracile.optim import FiraAdamW, param_groups

BLOCK = 64
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
RANKED = {"rank": 16, "target_modules": ["attn", "mlp"], "update_proj_gap": 10}

text = Path(argparse.__file__).read_bytes()
blocks = torch.tensor(list(text[: len(text) // BLOCK * BLOCK])).view(-1, BLOCK)
dataset = [{"input_ids": block, "labels": block} for block in blocks]
arguments = TrainingArguments(
    output_dir=sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="gracile-"),
    max_steps=15,
    per_device_train_batch_size=8,
    learning_rate=0.01,
    warmup_steps=2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,  # remove this line where there is a GPU
    seed=0,
)


def new_model():
    torch.manual_seed(0)
    return build_llama("2m", vocab_size=256, **SMALL)


class FiraTrainer(Trainer):
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = param_groups(self.model, **RANKED, weight_decay=self.args.weight_decay)
            self.optimizer = FiraAdamW(groups, lr=self.args.learning_rate)
        return self.optimizer


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


model = new_model()
keywords = {"params": param_groups(model, **RANKED, weight_decay=0.0), "lr": arguments.learning_rate}
by_class = losses_of(Trainer(model, arguments, train_dataset=dataset, optimizer_cls_and_kwargs=(FiraAdamW, keywords)))
by_subclass = losses_of(FiraTrainer(new_model(), arguments, train_dataset=dataset))

print(f"loss {by_class[0]:.3f} -> {by_class[-1]:.3f}; a subclass gives the same: {by_subclass == by_class}")
assert by_class[-1] < 0.85 * by_class[0]
assert by_subclass == by_class
