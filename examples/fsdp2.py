"""FSDP2 with GaLore on two processes: the numbers of one process, and half of the state in each.

    torchrun --nproc-per-node 2 fsdp2.py

Trains a small LLaMA on bytes of Python's own source text; nothing is downloaded. On GPUs the backend is nccl.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from gracile.models import build_llama
from gracile.optim import GaLoreAdamW, param_groups, state_bytes

BLOCK, BATCH, STEPS = 64, 8, 12  # the batch of all processes
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}

text = Path(argparse.__file__).read_bytes()
blocks = torch.tensor(list(text[: len(text) // BLOCK * BLOCK])).view(-1, BLOCK)


def start(split):
    torch.manual_seed(0)
    model = build_llama("2m", vocab_size=256, **SMALL)
    if split:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    groups = param_groups(model, rank=16, update_proj_gap=8, proj_type="right", shard_basis=True)
    return model, GaLoreAdamW(groups, lr=0.01)  # built after the model is split


def train(model, optimizer, rank, size):
    losses = []
    for step in range(STEPS):
        batch = blocks[torch.arange(step * BATCH, (step + 1) * BATCH) % len(blocks)].chunk(size)[rank]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
model, optimizer = start(split=True)
losses = train(model, optimizer, rank, size)
dist.all_reduce(losses)  # each process has the mean over its part of the batch
losses /= size

alone, whole_optimizer = start(split=False)
expected = train(alone, whole_optimizer, 0, 1)
held, whole = state_bytes(optimizer), state_bytes(whole_optimizer)
if rank == 0:
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; state {held:,} bytes in this process, {whole:,} in one alone")
torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
assert losses[-1] < 0.85 * losses[0]
assert held < 0.55 * whole
dist.barrier()
dist.destroy_process_group()
