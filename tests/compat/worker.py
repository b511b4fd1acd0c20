"""Runs on two processes, saved and gone on from.

    python worker.py save FOLDER [resume FOLDER]        with RANK and so on in the environment: ``launched``

``save`` trains each cell of CELLS: SAVED steps, then what the cell keeps, then MORE steps. The folder gets

    runs.pt       by the cell's name: weights, ``full_state`` (where kept), and the weights at the end
    first.pt      by the cell's name, of those in 8 bits: the weights after the first step
    NAME/         a checkpoint of DeepSpeed's engine, or one of torch.distributed.checkpoint

``resume`` goes on from what such a folder holds, in new models of other weights, and writes ``ends.pt`` beside the
``runs.pt`` that ``save`` wrote: by the cell's name the weights at the end, from each thing that was kept; and
``next.pt``, of those in 8 bits: the weights after each of the next NEXT steps.
"""

import contextlib
import logging
import os
import sys
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from make_checkpoints import MORE, PATTERN, SAVED, copied, packed, short
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gracile import optim

EPS = {"eps": 1e-6}
ADAFACTOR = {"lr": 0.05, "relative_step": False, "scale_parameter": False}
RANKED = {"rank": 4, "update_proj_gap": 4, "weight_decay": 0.1}
MASKED = {**EPS, "lr": 0.02, "update_every": 4, "t_end": 30}
CAST = {**EPS, "lr": 0.01, "n": None, "total_steps": SAVED + MORE - 1, "lam": 0.05}
# the class, the constructor's keys, and those of the groups of matrices
OPTIMIZERS = {
    "GaLoreAdamW": (optim.GaLoreAdamW, {"lr": 0.05}, RANKED),
    "GaLoreAdamW8bit": (optim.GaLoreAdamW8bit, {**EPS, "lr": 0.05}, RANKED),
    "LDAdamW": (optim.LDAdamW, {**EPS, "lr": 0.02}, {"rank": 4, "weight_decay": 0.1}),
    "RigLAdamW": (optim.RigLAdamW, MASKED, {"sparsity": 0.5, "weight_decay": 0.1}),
    "CastAdamS": (optim.CastAdamS, CAST, {**PATTERN, "mask_every": 4}),
    "GaLoreAdafactor": (optim.GaLoreAdafactor, ADAFACTOR, RANKED),
}
FULL, CHECKPOINT = "full_state", "checkpoint"
# optimizer, layout, what is kept
CELLS = {
    f"{optimizer} {layout}": (optimizer, layout, kept)
    for optimizer, layout, kept in [
        ("GaLoreAdamW", "zero2", [CHECKPOINT]),
        ("RigLAdamW", "zero2", [CHECKPOINT]),
        ("GaLoreAdamW8bit", "zero2", [CHECKPOINT]),
        ("GaLoreAdamW", "zero3", [FULL, CHECKPOINT]),
        ("RigLAdamW", "zero3", [FULL, CHECKPOINT]),
        ("GaLoreAdamW8bit", "zero3", [FULL, CHECKPOINT]),
        ("LDAdamW", "zero3", [FULL]),
        ("CastAdamS", "zero3", [FULL]),
        ("GaLoreAdafactor", "zero3", [FULL]),
        ("GaLoreAdamW", "fsdp2", [FULL, CHECKPOINT]),
        ("RigLAdamW", "fsdp2", [FULL, CHECKPOINT]),
        ("GaLoreAdamW8bit", "fsdp2", [FULL]),
        ("LDAdamW", "fsdp2", [FULL]),
        ("CastAdamS", "fsdp2", [FULL]),
        ("GaLoreAdafactor", "fsdp2", [FULL]),
    ]
}
TAG = "saved"
BATCH = 8
NEXT = 3  # a refresh at the last of them


def in_8_bits(name):
    """Where in a few steps rounding moves weights by percents: on another CPU only the first steps compare."""
    return "8bit" in name


class Net(nn.Module):
    """Matrices that are cut within a row; for 8 bits one of which each part has moments of 4160 elements."""

    def __init__(self, optimizer, seed):
        super().__init__()
        torch.manual_seed(seed)
        long = 20 if optimizer == "CastAdamS" else 21
        self.tall = nn.Linear(12, long)
        self.wide = nn.Linear(long, 12, bias=False)
        self.square = nn.Linear(12, 13, bias=False)
        self.long = nn.Linear(13, 34) if optimizer == "GaLoreAdamW8bit" else None
        self.longer = nn.Linear(34, 260, bias=False) if optimizer == "GaLoreAdamW8bit" else None

    def forward(self, x, y):
        h = torch.tanh(self.square(torch.tanh(self.wide(torch.tanh(self.tall(x))))))
        if self.longer is not None:
            h = self.longer(torch.tanh(self.long(h)))[:, ::20]
        return (h - y).square().mean()


def optimizer_for(net, name):
    kind, keys, of_matrices = OPTIMIZERS[name]
    lots = [([net.tall.weight, net.wide.weight], {}), ([net.square.weight], {})]
    if net.longer is not None:
        lots.append(([net.longer.weight], {"rank": 32}))
    chosen = {id(p) for lot, _ in lots for p in lot}
    groups = [{"params": lot, **of_matrices, **own} for lot, own in lots]
    return kind([*groups, {"params": [p for p in net.parameters() if id(p) not in chosen]}], **keys)


class Run:
    """A model, its optimizer and what trains them, in a layout."""

    def __init__(self, name, seed=0, weights=None, state=None):
        self.optimizer_name, self.layout, self.kept = CELLS[name]
        self.net = Net(self.optimizer_name, seed)
        if weights is not None:
            self.net.load_state_dict(weights)
        if self.layout == "fsdp2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for module in (*self.net.children(), self.net):
                fully_shard(module, mesh=mesh)
        self.optimizer = optimizer_for(self.net, self.optimizer_name)
        self.engine = None if self.layout == "fsdp2" else self._engine(int(self.layout[-1]))
        if state is not None:
            optim.load_full_state(self.optimizer, state)

    def _engine(self, stage):
        zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        config = {
            "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }
        return deepspeed.initialize(model=self.net, optimizer=self.optimizer, config=config)[0]

    def train(self, first, last):
        for step in range(first, last):
            batch = share(step)
            if self.engine is not None:
                self.engine.backward(self.engine(*batch))
                self.engine.step()
                continue
            self.net(*batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def end(self, first=SAVED):
        self.train(first, SAVED + MORE)
        return short(self.weights())

    def after_each(self, first, last):
        steps = []
        for step in range(first, last):
            self.train(step, step + 1)
            steps.append(short(self.weights()))
        return steps

    def weights(self):
        """Whole, on every process."""
        full = {}
        for name, p in self.net.named_parameters():
            with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext():
                whole = p.full_tensor() if hasattr(p, "full_tensor") else p
                full[name] = whole.detach().clone()
        return full

    def save(self, folder):
        if self.engine is not None:
            self.engine.save_checkpoint(folder, tag=TAG)
            return
        model_state, optimizer_state = get_state_dict(self.net, self.optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)

    def load(self, folder):
        if self.engine is not None:
            self.engine.load_checkpoint(folder, tag=TAG)
            return
        model_state, optimizer_state = get_state_dict(self.net, self.optimizer)
        saved = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(self.net, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])

    def close(self):
        if self.engine is not None:
            self.engine.destroy()


def share(step):
    generator = torch.Generator().manual_seed(step)
    size = BATCH // dist.get_world_size()
    both = torch.randn(BATCH, 12, generator=generator), torch.randn(BATCH, 13, generator=generator)
    return [part[dist.get_rank() * size :][:size] for part in both]


def save(folder):
    records, first = {}, {}
    for name, (_, _, kept) in CELLS.items():
        run = Run(name)
        weights = run.after_each(0, 1)
        if in_8_bits(name):
            first[name] = weights
        run.train(1, SAVED)
        records[name] = {"weights": run.weights()}
        if FULL in kept:
            records[name][FULL] = optim.full_state(run.optimizer)
        if CHECKPOINT in kept:
            run.save(str(folder / name.replace(" ", "_")))
        records[name]["end"] = run.end()
        run.close()
    written(records, folder / "runs.pt")
    written(first, folder / "first.pt")


def resume(folder, into):
    recorded = copied(torch.load(folder / "runs.pt", weights_only=True))
    ends, following = {}, {}
    for name, (_, _, kept) in CELLS.items():
        ends[name] = {}
        for what in kept:
            if what == FULL:
                run = Run(name, seed=1, weights=recorded[name]["weights"], state=recorded[name][FULL])
            else:
                run = Run(name, seed=1)
                run.load(str(folder / name.replace(" ", "_")))
            steps = run.after_each(SAVED, SAVED + NEXT)
            if in_8_bits(name):
                following.setdefault(name, {})[what] = steps
            ends[name][what] = run.end(SAVED + NEXT)
            run.close()
    written(ends, into / "ends.pt")
    written(following, into / "next.pt")


def written(records, path):
    if dist.get_rank() == 0:
        torch.save(packed(records), path)
    dist.barrier()


def main():
    folders = [Path(folder) for folder in sys.argv[2::2]]
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for inference alone
    deepspeed.init_distributed("gloo")
    for task, folder in zip(sys.argv[1::2], folders, strict=True):
        if task == "save":
            folder.mkdir(exist_ok=True)
            save(folder)
        else:
            resume(folder, into=folders[0])
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of the process group may outlive it


if __name__ == "__main__":
    main()
