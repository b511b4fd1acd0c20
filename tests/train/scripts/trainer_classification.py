"""Teach a small BERT from which of two alphabets a sequence is: ``python trainer_classification.py OUTPUT_DIR``.

Data and model are made here; nothing is downloaded. The optimizer is built here too and given to the Trainer.
"""

import json
import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

SEED, LENGTH, EXAMPLES = 0, 12, 256


class Sequences(torch.utils.data.Dataset):
    """Letters 0 to 9 or 6 to 15, drawn at random; the label says which."""

    def __init__(self):
        generator = torch.Generator().manual_seed(SEED)
        self.labels = torch.randint(2, (EXAMPLES,), generator=generator)
        letters = torch.randint(10, (EXAMPLES, LENGTH), generator=generator)
        self.tokens = letters + 6 * self.labels.unsqueeze(1)

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


torch.manual_seed(SEED)
config = BertConfig(
    vocab_size=16,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=LENGTH,
    initializer_range=0.1,
)
model = BertForSequenceClassification(config)

optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # the line to change

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=sys.argv[1],
        max_steps=10,
        per_device_train_batch_size=32,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=SEED,
    ),
    train_dataset=Sequences(),
    optimizers=(optimizer, None),
)
trainer.train()
print(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
