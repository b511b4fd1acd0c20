"""Run cells of the distributed matrix on this process group and compare each with one process.

    torchrun --nproc-per-node 2 cells.py CELLS.json RESULTS.json

A cell is a mapping: ``optimizer`` (a name below), ``layout`` (ddp, fsdp2, zero0 to zero3) and options. Every rank
trains its share of the same batches as one process, which rank 0 runs for itself; the results hold, for each cell, the
largest difference of a parameter relative to its norm and to its movement, and whether replicas agree.
"""

import contextlib
import json
import logging
import os
import sys
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gracile import optim

STEPS, GAP, RANK, BATCH = 20, 7, 6, 8

ADAFACTOR = {"relative_step": False, "scale_parameter": True, "beta1": 0.9, "lr": 0.1}
EPS = {"eps": 1e-6}  # an eps far below the gradients would show their rounding, not the layout's
# name -> class, constructor keys, keys of the matrices; None for an optimizer without ranks
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, EPS, None),
    "Lion": (optim.Lion, {"lr": 1e-3}, None),
    "GaLoreAdamW": (optim.GaLoreAdamW, {}, {}),
    "GaLoreAdamW iterate": (optim.GaLoreAdamW, {}, {"subspace_method": "iterate"}),
    "GaLoreAdamW8bit": (optim.GaLoreAdamW8bit, EPS, {}),
    "GaLoreAdamW8bit Q-GaLore": (optim.GaLoreAdamW8bit, EPS, {"quant": True, "cos_threshold": 0.4}),
    "GaLoreAdafactor": (optim.GaLoreAdafactor, ADAFACTOR, {}),
    "GaLoreLion": (optim.GaLoreLion, {"lr": 3e-3}, {}),
    "GaLorePlusAdamW": (optim.GaLorePlusAdamW, {}, {"residual_warmup": 5, "residual_fraction": 0.1}),
    "FiraAdamW": (optim.FiraAdamW, {}, {"subspace_method": "iterate"}),
    "GradNormLoRPAdamW": (optim.GradNormLoRPAdamW, {"lr": 3e-3}, {}),
    "DCTAdamW": (optim.DCTAdamW, EPS, {"update_proj_gap": 1}),
    "DCTAdamW fed back": (optim.DCTAdamW, EPS, {"update_proj_gap": 5, "error_feedback": "fp32"}),
    "DCTAdamW fed back in 8 bits": (optim.DCTAdamW, EPS, {"update_proj_gap": 1, "error_feedback": "8bit"}),
    "APOLLOAdamW": (optim.APOLLOAdamW, {}, {}),
    "APOLLOAdamW Mini": (optim.APOLLOAdamW, {}, {"rank": 1, "scale_type": "tensor", "scale": 8.0}),
    "APOLLOAdamW svd": (optim.APOLLOAdamW, {}, {"proj": "svd"}),
    "LDAdamW": (optim.LDAdamW, EPS, {}),
}


class Net(nn.Module):
    """Tall, wide and square matrices of sizes that no number of ranks divides, one smaller than a partition."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(37, 24)
        self.tall = nn.Linear(24, width)
        self.wide = nn.Linear(width, 28, bias=False)
        self.near = nn.Linear(28, 30)
        self.square = nn.Linear(30, 30, bias=False)
        self.small = nn.Linear(30, 13, bias=False)
        self.out = nn.Linear(13, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 37, bias=False)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x, y):
        h = self.embed(x)
        for layer in (self.tall, self.wide, self.near, self.square, self.small):
            h = torch.tanh(layer(h))
        return nn.functional.cross_entropy(self.head(self.norm(self.out(h))).flatten(0, 1).float(), y.flatten())


def build(cell):
    torch.manual_seed(0)
    return Net(cell.get("width", 45))


def batch(step, micro):
    generator = torch.Generator().manual_seed(1000 * micro + step)
    x = torch.randint(37, (BATCH, 6), generator=generator)
    return x, (3 * x + 1) % 37


def make_optimizer(net, cell):
    """Two ranked groups, with different rank, gap and side, and the rest."""
    kind, keys, matrix_keys = OPTIMIZERS[cell["optimizer"]]
    trained = [p for p in net.parameters() if p.requires_grad]
    if matrix_keys is None:
        return kind([{"params": trained[:5]}, {"params": trained[5:]}], **{"lr": 0.01, **keys})
    ranked = {"rank": RANK, "weight_decay": 0.1, **matrix_keys}
    if "update_proj_gap" not in ranked and kind is not optim.LDAdamW:
        ranked["update_proj_gap"] = GAP
    other = {**ranked, "rank": max(1, ranked["rank"] - 2), "proj_type": cell.get("proj_type", "std")}
    if ranked.get("update_proj_gap", 1) > 1:
        other["update_proj_gap"] = GAP - 2
    first, second = [net.tall.weight, net.wide.weight], [net.near.weight, net.square.weight, net.small.weight]
    chosen = {id(p) for p in first + second}
    rest = [p for p in trained if id(p) not in chosen]
    groups = [{"params": first, **ranked}, {"params": second, **other}, {"params": rest}]
    return kind(groups, **{"lr": 0.01, **keys})


def weights_of(net):
    return {name: p.detach().float().clone() for name, p in net.named_parameters()}


def alone(cell):
    """The weights before and after, in one process, and the bytes of its state."""
    net = build(cell)
    before, optimizer = weights_of(net), make_optimizer(net, cell)
    parts = cell.get("accumulation", 1)
    for step in range(STEPS):
        for micro in range(parts):
            (net(*batch(step, micro)) / parts).backward()
        if cell.get("clip"):
            nn.utils.clip_grad_norm_(net.parameters(), cell["clip"])
        optimizer.step()
        optimizer.zero_grad()
    return before, weights_of(net), optim.state_bytes(optimizer)


def share(step, micro):
    size = BATCH // dist.get_world_size()
    return [part[dist.get_rank() * size :][:size] for part in batch(step, micro)]


def steps_of(cell):
    return range(*cell.get("steps", (0, STEPS)))


def taken_over(net, cell):
    """The full state that an earlier cell saved; its weights are put into the model."""
    if "load" not in cell:
        return None
    saved = torch.load(cell["load"], weights_only=True)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(saved["model"][name])
    return saved["optimizer"]


def keep(full, optimizer, cell):
    if "save" in cell:
        state = optim.full_state(optimizer)
        if dist.get_rank() == 0:
            torch.save({"model": full, "optimizer": state}, cell["save"])
        dist.barrier()


def replicated(cell):
    """DistributedDataParallel and FSDP2, in a plain loop."""
    net = build(cell)
    state = taken_over(net, cell)
    if cell["layout"] == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in net.children():
            fully_shard(module, mesh=mesh)
        model = fully_shard(net, mesh=mesh)
    else:
        model = DistributedDataParallel(net)
    optimizer = make_optimizer(net, cell)
    if state:
        optim.load_full_state(optimizer, state)
    parts = cell.get("accumulation", 1)
    for step in steps_of(cell):
        for micro in range(parts):
            (model(*share(step, micro)) / parts).backward()
        if cell.get("clip"):
            nn.utils.clip_grad_norm_(net.parameters(), cell["clip"])
        optimizer.step()
        optimizer.zero_grad()
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in net.named_parameters()}
    full = {name: p.detach().clone() for name, p in full.items()}
    keep(full, optimizer, cell)
    return full, optimizer


def started(cell):
    """DeepSpeed's engine, as its users make it, and the optimizer that they give it."""
    stage = int(cell["layout"][-1])
    options = {"stage": stage, **cell.get("zero", {})}
    if stage == 3:
        options.setdefault("stage3_param_persistence_threshold", 0)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_accumulation_steps": cell.get("accumulation", 1),
        "gradient_clipping": cell.get("clip", 0.0),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": options,
        **cell.get("config", {}),
    }
    inside = deepspeed.zero.Init(config_dict_or_path=config) if cell.get("zero_init") else contextlib.nullcontext()
    with inside:
        net = build(cell)
    state = taken_over(net, cell)
    optimizer = make_optimizer(net, cell)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    if state:
        optim.load_full_state(optimizer, state)
    return engine, optimizer


def train(engine, cell, steps):
    for step in steps:
        for micro in range(cell.get("accumulation", 1)):
            engine.backward(engine(*share(step, micro)))
            engine.step()


def weights_of_engine(engine):
    full = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext():
            full[name] = p.detach().float().clone()
    return full


def zero(cell):
    engine, optimizer = started(cell)
    train(engine, cell, steps_of(cell))
    full = weights_of_engine(engine)
    keep(full, optimizer, cell)
    engine.destroy()
    return full, optimizer


def replicas_agree(full, optimizer):
    """Whether all ranks hold the same bits of the weights, and of each basis that they all hold."""
    held = [*full.values()]
    held += [v for p in optimizer.state.values() for k, v in sorted(p.items()) if k.endswith("basis")]
    same = True
    for tensor in held:
        first = tensor.float().contiguous()
        mine = first.clone()
        dist.broadcast(first, 0)
        same &= torch.equal(first, mine)
    flag = torch.tensor(float(same))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def run(cell, reference):
    full, optimizer = replicated(cell) if cell["layout"] in ("ddp", "fsdp2") else zero(cell)
    agree = replicas_agree(full, optimizer)
    held = torch.tensor(float(optim.state_bytes(optimizer)))
    dist.all_reduce(held, dist.ReduceOp.MAX)
    if dist.get_rank() != 0:
        return None
    before, after, whole = reference
    gaps = {name: torch.linalg.vector_norm(full[name] - after[name]).item() for name in after}
    moved = {name: torch.linalg.vector_norm(after[name] - before[name]).item() for name in after}
    return {
        "difference": max(gap / torch.linalg.vector_norm(after[name]).item() for name, gap in gaps.items()),
        "of_movement": max(gap / moved[name] for name, gap in gaps.items() if moved[name] > 0),
        "moved": min(moved[name] for name in after if name != "frozen"),
        "replicas_agree": agree,
        "state_bytes": int(held),
        "state_bytes_alone": whole,
    }


def main():
    cells, results = sys.argv[1:3]
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    with open(cells) as file:
        todo = json.load(file)
    told = []
    for cell in todo:
        reference = alone(cell) if dist.get_rank() == 0 else None
        result = run(cell, reference)
        told.append({**cell, **(result or {})})
    if dist.get_rank() == 0:
        with open(results, "w") as file:
            json.dump(told, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
