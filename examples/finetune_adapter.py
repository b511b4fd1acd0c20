"""A script for peft in which one line names another adapter, on a LLaMA and on a Qwen2 with grouped queries.

    python finetune_adapter.py

What comes after ``get_peft_model`` is peft's own: saving, loading, merging. ``to_lora`` writes a LoRA, which loads
without gracile. The models are small; they learn bytes of Python source text, and then of a table of names in it.
Nothing is downloaded.
"""

import argparse
import html.entities
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from gracile.adapters import SorsaConfig as LoraConfig  # was: from peft import LoraConfig
from gracile.adapters import to_lora

BLOCK, BATCH, STEPS = 64, 8, 40
SMALL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": BLOCK}
FAMILIES = (LlamaConfig(**SMALL, **HEADS), Qwen2Config(**SMALL, **HEADS, tie_word_embeddings=True))


def blocks_of(module):
    text = Path(module.__file__).read_bytes()
    return torch.tensor(list(text[: len(text) // BLOCK * BLOCK])).view(-1, BLOCK)


def train(model, blocks, lr):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(STEPS):
        batch = blocks[torch.arange(step * BATCH, (step + 1) * BATCH) % len(blocks)]
        loss = model.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=table[:2]).logits


source, table = blocks_of(argparse), blocks_of(html.entities)[: 2 * BATCH]
for config in FAMILIES:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / config.model_type
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    train(base, source, lr=0.01)
    base.save_pretrained(folder / "base")

    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    losses, (trained, _) = train(model, table, lr=0.01), model.get_nb_trainable_parameters()
    print(f"{config.model_type}: loss {losses[0]:.3f} -> {losses[-1]:.3f}; {trained:,} numbers are trained")
    assert losses[-1] < 0.9 * losses[0]

    model.save_pretrained(folder / "adapter")
    to_lora(model, folder / "lora")
    found = logits(model)
    for saved in ("adapter", "lora"):
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / saved)
        torch.testing.assert_close(logits(again), found, rtol=0, atol=1e-4)
    merged = model.merge_and_unload()  # an ordinary model
    torch.testing.assert_close(logits(merged), found, rtol=0, atol=1e-4)

print("saved, loaded, written as LoRA and merged, it computes the same")
