"""Jobs for the test of the pool."""

import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist


def summed(number):
    """The sum over ranks, and what each of them is."""
    dist.init_process_group("gloo")
    total = torch.tensor(float(number + dist.get_rank()))
    dist.all_reduce(total)
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, (os.getpid(), hash("text"), os.environ["LOCAL_RANK"]))
    return total.item(), found


def failing(rank):
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise KeyError(f"what rank {rank} is missing")
    dist.barrier()


def sleeping(path):
    """With a process of its own, whose number is written down."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(f"{path}/{os.environ['RANK']}", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(600)
