"""A script of our own with what published ones expect: torchrun, a GPU, NCCL, C4 and a tokenizer of the hub, wandb."""

import os
import sys

import datasets
import torch
import torch.distributed as dist
import wandb
from galore_torch import GaLoreAdamW
from loguru import logger
from model import Bytes
from transformers import AutoTokenizer

torch.manual_seed(0)
local_rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(local_rank)
dist.init_process_group(backend="nccl", rank=local_rank, world_size=int(os.environ["WORLD_SIZE"]))
wandb.init(project="c4")
device = f"cuda:{local_rank}"
data = datasets.load_dataset("allenai/c4", "en", split="train", streaming=True)
tokenizer = AutoTokenizer.from_pretrained("t5-base", model_max_length=16)
model = Bytes(tokenizer.vocab_size).to(device=device)
regular = [p for p in model.parameters() if p is not model.proj.weight]
groups = [
    {"params": regular},
    {"params": [model.proj.weight], "rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"},
]
optimizer = GaLoreAdamW(groups, lr=0.01)
replica = torch.nn.parallel.DistributedDataParallel(model, device_ids=[local_rank], output_device=local_rank)
for step, example in enumerate(data):
    if step == int(sys.argv[1]):
        break
    ids = tokenizer(example["text"], max_length=16, truncation=True, return_tensors="pt")["input_ids"].to(device)
    replica(ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    wandb.log({"loss": 0.0, "memory": torch.cuda.max_memory_allocated()})
logger.info("done")
