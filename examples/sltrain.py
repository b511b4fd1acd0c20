"""SLTrain: weights that are sparse plus low-rank, trained from scratch, then merged into plain linear layers.

    python sltrain.py

Trains a small LLaMA on bytes of Python's own source text; nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from gracile.models import build_llama
from gracile.models.convert import convert, merge
from gracile.models.layers import SparseLowRankLinear
from gracile.optim import SLTrainAdamW, param_groups, state_bytes

BLOCK, BATCH, STEPS = 64, 8, 40
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}

text = Path(argparse.__file__).read_bytes()
blocks = torch.tensor(list(text[: len(text) // BLOCK * BLOCK])).view(-1, BLOCK)

torch.manual_seed(0)
model = build_llama("2m", vocab_size=256, **SMALL)
dense = sum(p.numel() for p in model.parameters())
convert(model, SparseLowRankLinear, target_modules=["attn", "mlp"], rank=8, density=0.05, alpha=16.0)
stored = sum(p.numel() for p in model.parameters())
optimizer = SLTrainAdamW(param_groups(model), lr=0.01)

losses = []
for step in range(STEPS):
    batch = blocks[torch.arange(step * BATCH, (step + 1) * BATCH) % len(blocks)]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {stored:,} trained numbers instead of {dense:,}")
print(f"optimizer state: {state_bytes(optimizer):,} bytes")
assert losses[-1] < 0.75 * losses[0]
assert stored < 0.6 * dense

model.eval()
with torch.no_grad():
    before = model(input_ids=blocks[:2]).logits
    merge(model)  # save_pretrained now writes a model that loads without gracile
    after = model(input_ids=blocks[:2]).logits
assert not any(isinstance(module, SparseLowRankLinear) for module in model.modules())
assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
print("merged into plain linear layers that compute the same")
