"""A plain training loop with GaLore, stopped half way and resumed to the same bits.

    python plain_loop.py

Trains a small LLaMA on bytes of Python's own source text; nothing is downloaded.
"""

import argparse
import copy
from pathlib import Path

import torch

from gracile.models import build_llama
from gracile.optim import GaLoreAdamW, param_groups, state_bytes

BLOCK, BATCH, STEPS = 64, 8, 40
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}

text = Path(argparse.__file__).read_bytes()
blocks = torch.tensor(list(text[: len(text) // BLOCK * BLOCK])).view(-1, BLOCK)


def start():
    torch.manual_seed(0)
    model = build_llama("2m", vocab_size=256, **SMALL)
    groups = param_groups(model, rank=16, target_modules=["attn", "mlp"], update_proj_gap=10, scale=0.25)
    optimizer = GaLoreAdamW(groups, lr=0.02)  # instead of torch.optim.AdamW(model.parameters(), lr=0.002)
    return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=5)


def train(model, optimizer, scheduler, steps):
    losses = []
    for step in steps:
        batch = blocks[torch.arange(step * BATCH, (step + 1) * BATCH) % len(blocks)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


run = start()
losses = train(*run, range(STEPS // 2))
saved = copy.deepcopy([part.state_dict() for part in run])  # torch.save writes it, weights_only=True reads it
losses += train(*run, range(STEPS // 2, STEPS))

resumed = start()
for part, state in zip(resumed, saved, strict=True):
    part.load_state_dict(state)
again = train(*resumed, range(STEPS // 2, STEPS))

model, optimizer, _ = run
adamw = sum(2 * p.numel() * p.element_size() for p in model.parameters())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; optimizer state {state_bytes(optimizer):,} bytes, AdamW {adamw:,}")
assert losses[-1] < 0.7 * losses[0]
assert again == losses[STEPS // 2 :], "the resumed run must equal the uninterrupted one"
assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed[0].parameters(), strict=True))
print("the resumed run equals the uninterrupted one, to the bit")
