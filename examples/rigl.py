"""Sparse training with RigL, and the trained model stored without its zeros.

    python rigl.py [OUTPUT_DIR]

Trains a small LLaMA on bytes of Python's own source text; nothing is downloaded.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from gracile.models import build_llama
from gracile.models.sparse_export import load, save, sparsify
from gracile.optim import RigLAdamW, param_groups

BLOCK, BATCH, STEPS, SPARSITY = 64, 8, 40, 0.8
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}

text = Path(argparse.__file__).read_bytes()
blocks = torch.tensor(list(text[: len(text) // BLOCK * BLOCK])).view(-1, BLOCK)

torch.manual_seed(0)
model = build_llama("2m", vocab_size=256, **SMALL)
groups = param_groups(model, sparsity=SPARSITY, target_modules=["attn", "mlp"])
optimizer = RigLAdamW(groups, lr=0.01, update_every=5, t_end=3 * STEPS // 4, rescale_init=True)
masked = groups[0]["params"]
first_masks = [p != 0 for p in masked]

losses = []
for step in range(STEPS):
    batch = blocks[torch.arange(step * BATCH, (step + 1) * BATCH) % len(blocks)]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

weights = sum(p.numel() for p in masked)
kept = sum(int(p.count_nonzero()) for p in masked)
moved = sum(int(((p != 0) & ~first).sum()) for p, first in zip(masked, first_masks, strict=True))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {1 - kept / weights:.3f} of the target weights are zero")
print(f"{moved} of {kept} weights are in places that were masked at first")
assert losses[-1] < 0.75 * losses[0]
assert abs(1 - kept / weights - SPARSITY) < 0.001
assert moved > 0

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="gracile-"))
model.eval()
with torch.no_grad():
    dense = model(input_ids=blocks[:2]).logits
    sparsify(model, "csr")
    save(model, folder)
    sparse = load(folder)(input_ids=blocks[:2]).logits
torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
print(f"stored as CSR in {sum(f.stat().st_size for f in folder.iterdir()):,} bytes; it computes the same")
