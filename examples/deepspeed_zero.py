"""DeepSpeed ZeRO with GaLore on two processes, and a resumed engine that goes on to the same bits.

    deepspeed --num_accelerators 2 deepspeed_zero.py [OUTPUT_DIR]

The stage is in ds_config.json. Trains a small LLaMA on bytes of Python's own source text; nothing is downloaded.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from gracile.models import build_llama
from gracile.optim import GaLoreAdamW, param_groups, state_bytes

BLOCK, BATCH, STEPS = 64, 4, 16  # the batch of one process
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}

text = Path(argparse.__file__).read_bytes()
blocks = torch.tensor(list(text[: len(text) // BLOCK * BLOCK])).view(-1, BLOCK)


def start():
    torch.manual_seed(0)
    model = build_llama("2m", vocab_size=256, **SMALL)
    optimizer = GaLoreAdamW(param_groups(model, rank=16, update_proj_gap=8, scale=0.25), lr=0.02)
    config = str(Path(__file__).with_name("ds_config.json"))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer


def train(engine, steps):
    losses = []
    for step in steps:
        first = (step * dist.get_world_size() + dist.get_rank()) * BATCH
        batch = blocks[torch.arange(first, first + BATCH) % len(blocks)].to(engine.device)
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on CPUs: an op for inference that is slow to compile
deepspeed.init_distributed()
named = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]  # the launcher's
folder = [named[0] if named else tempfile.mkdtemp(prefix="gracile-")]
dist.broadcast_object_list(folder)

engine, optimizer = start()
losses = train(engine, range(STEPS // 2))
engine.save_checkpoint(folder[0])
losses += train(engine, range(STEPS // 2, STEPS))
resumed, _ = start()
resumed.load_checkpoint(folder[0])
again = train(resumed, range(STEPS // 2, STEPS))

if dist.get_rank() == 0:
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; this process holds {state_bytes(optimizer):,} bytes of state")
assert losses[-1] < 0.85 * losses[0]
assert again == losses[STEPS // 2 :], "the resumed engine must equal the uninterrupted one"
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # under ZeRO 3 a thread of gloo may abort the interpreter's end, whatever the optimizer
