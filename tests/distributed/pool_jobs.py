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


def changes_seen_late(arguments):
    """The changed keys that each rank has found, where the second one looks after the first has written run.yaml."""
    from gracile.train import pretrain

    check, train, seen = pretrain.check_same_run, pretrain._train, []

    def late(config, folder, *rest):
        before, deadline = (folder / "run.yaml").stat().st_mtime_ns, time.monotonic() + 20
        while os.environ["RANK"] == "1" and time.monotonic() < deadline:
            if (folder / "run.yaml").stat().st_mtime_ns != before:
                break
            time.sleep(0.01)
        return check(config, folder, *rest)

    def noted(trainer, checkpoint):
        seen.append(sorted(trainer.changed_keys))
        return train(trainer, checkpoint)

    pretrain.check_same_run, pretrain._train = late, noted
    assert pretrain.main(arguments) == 0
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, seen)
    return found
