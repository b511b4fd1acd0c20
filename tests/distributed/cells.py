"""Run cells of the distributed matrix on the processes of a pool's job and compare each with one process.

A cell is a mapping: ``optimizer`` (a name below), ``layout`` (ddp, fsdp2, zero0 to zero3) and options. Every rank
trains its share of the same batches as one process; the results hold, for each cell, the largest difference of a
parameter relative to its norm and to its movement, whether replicas agree, the bytes of state, the bytes that the
optimizer sends, and whether all that ``holds``: after 12 steps with two or more refreshes a cell may differ by 1e-5 of
each parameter and 1e-4 of its movement

    from one process that is fed the very gradients of the run ("replayed"): always;
    from one process that trains by itself: in fp32, but for methods that jump where a gradient changes in its last bit,
    as exact singular vectors and 8-bit codes do.

Moments and errors in 8 bits change by a whole step of their codes where a last bit decides: they are held to 1e-3 and
5e-3; blocks that do not lie where those of one process do would show as more than that. Singular vectors turn by a
rounding over the distance to the next singular value: SST, which trains them, is held to 3e-5 of a parameter. In bf16
the one process is the same engine on one rank: a launch on one rank writes its weights to ``alone``, later ones read
them there.
"""

import contextlib
import itertools
import logging
import os
import warnings
from inspect import signature

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import deepspeed
import torch
import torch.distributed as dist
from catalogue import CELL_STEPS, GAP, VARIANTS, is_in_8_bits
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gracile import optim
from gracile.models.convert import convert
from gracile.optim.core.optimizer import ShardedOptimizer
from gracile.optim.distributed.process_group import _gloo_group
from gracile.train.engines.deepspeed_ops import skip_inference_reduce
from gracile.train.measurement.comm_bytes import Traffic

STEPS, RANK, BATCH = CELL_STEPS, 6, 8
SIZES = (24, 45, 28)
OF_PARAMETER, OF_MOVEMENT = 1e-5, 1e-4
IN_8_BITS = 1e-3, 5e-3
DECOMPOSED = 3e-5, 1e-4

SIZES_OF = {"SRSTEAdamW": (24, 45, 27), "CastAdamS": (24, 45, 27)}  # rows that m divides
TARGETS = ["tall", "wide", "near", "square", "small"]


BACKEND_OF = dist.get_backend


class Net(nn.Module):
    """Tall, wide and square matrices of sizes that no number of ranks divides, one smaller than a partition; and, where
    they are asked for, a mixture of experts, each in one tensor, of which the last sees nothing in some steps."""

    def __init__(self, width, long, short, experts=0):
        super().__init__()
        self.experts = experts
        if experts:
            self.up = nn.Parameter(0.2 * torch.randn(experts, long - 12, short))
            self.down = nn.Parameter(0.2 * torch.randn(experts, short, long - 12))
        self.embed = nn.Embedding(37, width)
        self.tall = nn.Linear(width, long)
        self.wide = nn.Linear(long, short, bias=False)
        self.near = nn.Linear(short, 30)
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
            if layer is self.wide and self.experts:
                h = h + self.mixed(h, torch.where(x[:, :1] % 8 == 0, self.experts - 1, x % (self.experts - 1)))
        logits = self.head(self.norm(self.out(h))).flatten(0, 1)
        return nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y.flatten())

    def mixed(self, h, chosen):
        out = torch.zeros_like(h)
        for e in range(self.experts):
            taken = (chosen == e).unsqueeze(-1)
            out = out + taken * (torch.tanh(h @ self.up[e].t()) @ self.down[e].t())
        return out


def build(cell, seed=0):
    torch.manual_seed(seed)
    sizes = cell.get("sizes", SIZES_OF.get(cell["optimizer"], SIZES))
    net = Net(*sizes, experts=cell.get("experts", 0))
    if layer := VARIANTS[cell["optimizer"]].layer:
        kind, keys, _ = layer
        ranked = {"rank": cell.get("rank", RANK)} if "rank" in signature(kind).parameters else {}
        convert(net, kind, TARGETS, **ranked, **keys)
    return net.double() if cell.get("fp64") else net


def batch(step, micro):
    generator = torch.Generator().manual_seed(1000 * micro + step)
    x = torch.randint(37, (BATCH, 6), generator=generator)
    return x, (3 * x + 1) % 37


def make_optimizer(net, cell, together=True, construct=None):
    """Two ranked groups, with different rank, gap and side, and the rest; or groups of whole layers, and the rest.

    ``together``: on all processes, not in this one by itself. ``construct``: what is called in the class's place.
    """
    variant = VARIANTS[cell["optimizer"]]
    kind, (keys, matrix_keys) = variant.cls, variant.cells
    construct = construct or kind
    if matrix_keys and "m" in matrix_keys:
        return construct(optim.param_groups(net, None, TARGETS, weight_decay=0.1, **matrix_keys), **keys)
    if variant.layer:
        more = {"synchronize": together} if kind is optim.SSTAdamW else {}
        groups = [[*net.tall.parameters(), *net.wide.parameters()]]
        groups += [[p for p in net.parameters() if p.requires_grad and not any(p is q for q in groups[0])]]
        return construct([{"params": group} for group in groups], **{**keys, **more})
    if matrix_keys and "role" in matrix_keys:
        return construct(optim.param_groups(net, weight_decay=0.1, **matrix_keys), **keys)
    trained = [p for p in net.parameters() if p.requires_grad]
    if matrix_keys is None:
        return construct([{"params": trained[:5]}, {"params": trained[5:]}], **{"lr": 0.01, **keys})
    if "sparsity" in matrix_keys or "keep" in matrix_keys:
        return construct(masked_groups(net, trained, matrix_keys), **{"lr": 0.01, **keys})
    ranked = {"rank": cell.get("rank", RANK), "weight_decay": 0.1, **matrix_keys, **cell.get("keys", {})}
    if "update_proj_gap" not in ranked and kind is not optim.LDAdamW:
        ranked["update_proj_gap"] = GAP
    other = {**ranked, "rank": max(1, ranked["rank"] - 2), "proj_type": cell.get("proj_type", "std")}
    if ranked.get("update_proj_gap", 1) > 1:
        other["update_proj_gap"] = GAP - 2
    first, second = [net.tall.weight, net.wide.weight], [net.near.weight, net.square.weight, net.small.weight]
    first += [net.up, net.down] if net.experts else []
    chosen = {id(p) for p in first + second}
    rest = [p for p in trained if id(p) not in chosen]
    groups = [{"params": first, **ranked}, {"params": second, **other}, {"params": rest}]
    return construct(groups, **{"lr": 0.01, **keys})


def masked_groups(net, trained, keys):
    """Two groups of different sparsity, in blocks as large as divide their matrices, and the rest."""
    other = {"sparsity": 0.5} if "sparsity" in keys else {"keep": 0.4}
    lots = [([net.tall.weight, net.wide.weight], {}), ([net.near.weight, net.square.weight], other)]
    if "block_size" in keys:
        lots = [([net.tall.weight], {"block_size": 3}), ([net.near.weight, net.square.weight], {"block_size": 2})]
    else:
        lots[1][0].append(net.small.weight)
    chosen = {id(p) for lot, _ in lots for p in lot}
    groups = [{"params": lot, "weight_decay": 0.1, **keys, **own} for lot, own in lots]
    return [*groups, {"params": [p for p in trained if id(p) not in chosen]}]


def weights_of(net):
    return {name: p.detach().float().clone() for name, p in net.named_parameters()}


def alone(cell):
    """The weights before and after, in one process, and the bytes of its state."""
    net = build(cell)
    before, optimizer = weights_of(net), make_optimizer(net, cell, together=False)
    parts = cell.get("accumulation", 1)
    for step in range(steps_of(cell).stop):
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
    saved = optim.read_published(cell["load"])
    with torch.no_grad():
        for name, p in [*net.named_parameters(), *net.named_buffers()]:
            p.copy_(saved["model"][name])
    return saved["optimizer"]


def keep(net, full, optimizer, cell):
    if "save" in cell:
        full = full | dict(net.named_buffers())
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
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {"mesh": mesh, **({"mp_policy": policy} if is_bf16(cell) else {})}
        for module in (net.tall, net.square):  # what is left of the net is a group of its own
            fully_shard(module, **options)
        model = fully_shard(net, **options)
    else:
        model = DistributedDataParallel(net)
    optimizer = make_optimizer(net, cell)
    if state:
        optim.load_full_state(optimizer, state)
    watch = Watch(optimizer, cell)
    parts = cell.get("accumulation", 1)
    for step in steps_of(cell):
        for micro in range(parts):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16(cell) and cell["layout"] == "ddp"):
                loss = model(*share(step, micro))
            (loss / parts).backward()
        if cell.get("clip"):
            nn.utils.clip_grad_norm_(net.parameters(), cell["clip"])
        optimizer.step()
        optimizer.zero_grad()
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in net.named_parameters()}
    full = {name: p.detach().clone() for name, p in full.items()}
    keep(net, full, optimizer, cell)
    watch.close(optimizer)
    return full, optimizer, watch


def config_of(cell):
    """DeepSpeed's."""
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
    }
    if is_bf16(cell):
        config["bf16"] = {"enabled": True}
    if cell.get("precision") == "bf16, fp32 gradients":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def started(cell):
    """DeepSpeed's engine, as its users make it, and the optimizer that they give it."""
    config = config_of(cell)
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


def weights_of_engine(engine, cell):
    """The fp32 weights, whole."""
    full = {}
    for name, p in engine.module.named_parameters():
        # DeepSpeed's own way to the fp32 weights is wrong under round_robin_gradients
        if is_bf16(cell) and p.requires_grad and not cell.get("zero", {}).get("round_robin_gradients"):
            full[name] = safe_get_full_fp32_param(p).clone()
            continue
        with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext():
            full[name] = p.detach().float().clone()
    return full


def zero(cell):
    engine, optimizer = started(cell)
    watch = Watch(optimizer, cell)
    train(engine, cell, steps_of(cell))
    full = weights_of_engine(engine, cell)
    keep(engine.module, full, optimizer, cell)
    watch.close(optimizer)
    engine.destroy()
    return full, optimizer, watch


def is_bf16(cell):
    return cell.get("precision", "fp32") != "fp32"


class Replay:
    """One process, whole and in fp32, that is fed the very gradients of a run: what differs is the optimizer's doing,
    not that of gradients in bf16."""

    def __init__(self, split, cell):
        self.optimizer = make_optimizer(build(cell), cell, together=False)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.before = self.weights(split)
        for position, weights in self.before.items():
            self.parameters[position].data = weights.clone()

    def step(self, split):
        for position, gradient in together(self.shards(split)).items():
            self.parameters[position].grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self, split):
        """By position, at rank 0."""
        shards = self.shards(split, stepped_now=False)
        return together((member, shard, shard.parameter) for member, shard, _ in shards)

    def shards(self, split, stepped_now=True):
        # DeepSpeed steps group by group, and with offload all groups have gradients all the time
        now = ((group, group["params"]) for group in split.param_groups)
        for group, tensors in now if stepped_now else split.stepped_parameters():
            for p in tensors:
                if p.grad is not None or (p.requires_grad and not stepped_now):
                    for member, shard, _ in split.shards_of(p, group):
                        yield member, shard, (shard.gradient if shard.split else p.grad)

    def told(self, split):
        """The largest difference of a parameter, relative to it and to its movement."""
        gaps, moved = [0.0], [0.0]
        for position, weights in self.weights(split).items():
            p = self.parameters[position].detach()
            gap = torch.linalg.vector_norm(weights - p)
            gaps.append((gap / torch.linalg.vector_norm(p)).item())
            moved.append((gap / torch.linalg.vector_norm(p - self.before[position])).item())
        return {"replayed": max(gaps), "replayed_of_movement": max(moved)}


def together(shards):
    """Whole tensors at rank 0, by position, from each rank's parts of them, sent as one."""
    found, split = {}, []
    for member, shard, own in shards:
        if getattr(shard, "held", None) is not None:
            split.append((member.position, shard, own.detach().reshape(-1)))
        else:
            found[member.position] = own.detach().float().clone()
    if not split:
        return found
    lengths = [[b - a for a, b in itertools.pairwise(shard.held.bounds)] for _, shard, _ in split]
    of_ranks = [sum(column) for column in zip(*lengths, strict=True)]
    sent = split[0][1].held.processes.gather(torch.cat([own for *_, own in split]), of_ranks, 0)
    if sent is None:
        return {}
    parts = [part.split(column) for part, *column in zip(sent.split(of_ranks), *lengths, strict=True)]
    for number, (position, shard, _) in enumerate(split):
        found[position] = torch.cat([of_rank[number] for of_rank in parts]).view(shard.shape).float()
    return found


class Watch:
    """The steps of an optimizer watched: the bytes that this rank sends, in the usual algorithms of each collective,
    and what one process makes of the same gradients."""

    def __init__(self, optimizer, cell):
        self.steps, inner = [], optimizer.step
        self.asked = len(range(*cell.get("steps", (0, STEPS))))
        self.replay, self.replayed = None, {}
        if not isinstance(optimizer, ShardedOptimizer) or not cell.get("watched", True):
            return  # torch's own sends nothing
        self.replay = Replay(optimizer, cell)

        def step(*arguments, **keywords):
            self.replay.step(optimizer)
            if not cell.get("traffic"):
                return inner(*arguments, **keywords)
            with Traffic() as traffic:
                told = inner(*arguments, **keywords)
            self.steps.append(traffic.bytes)
            return told

        optimizer.step = step

    def close(self, optimizer):
        if self.replay:
            self.replayed = self.replay.told(optimizer)

    def told(self):
        """Bytes sent in a step between refreshes, and in one with a refresh (after the first, which starts cold)."""
        if not self.steps:
            return {"sent": 0, "sent_at_refresh": 0, **self.replayed}
        calls = len(self.steps) // self.asked  # DeepSpeed steps each group, or sub-group, by itself
        steps = [sum(self.steps[i : i + calls]) for i in range(0, len(self.steps), calls)]
        return {"sent": min(steps), "sent_at_refresh": max(steps[1:]), **self.replayed}


def replicas_agree(full, optimizer, cell):
    """Whether all ranks hold the same bits of the weights, and of each basis that they all hold: not of experts', which
    are stacked, or one after the other."""
    held = [*full.values()]
    if not cell.get("keys", {}).get("shard_basis"):
        held += [
            v for p in optimizer.state.values() for k, v in sorted(p.items()) if k.endswith("basis") and v.dim() == 2
        ]
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
    full, optimizer, watch = replicated(cell) if cell["layout"] in ("ddp", "fsdp2") else zero(cell)
    agree = replicas_agree(full, optimizer, cell)
    assert bool(cell.get("nccl")) == bool(_gloo_group.cache_info().currsize)
    _gloo_group.cache_clear()
    if dist.get_world_size() == 1:
        torch.save((weights_of(build(cell)), full, optim.state_bytes(optimizer)), cell["alone"])
        return None
    held = torch.tensor(float(optim.state_bytes(optimizer)))
    dist.all_reduce(held, dist.ReduceOp.MAX)
    if dist.get_rank() != 0 or reference is None:
        return None
    before, after, whole = reference
    gaps = {name: torch.linalg.vector_norm(full[name] - after[name]).item() for name in after}
    moved = {name: torch.linalg.vector_norm(after[name] - before[name]).item() for name in after}
    all_gaps, all_moved = (sum(x**2 for x in values.values()) ** 0.5 for values in (gaps, moved))
    told = {
        "overall": all_gaps / all_moved,
        "difference": max(gap / torch.linalg.vector_norm(after[name]).item() for name, gap in gaps.items()),
        "of_movement": max(gap / moved[name] for name, gap in gaps.items() if moved[name] > 0),
        "moved": min(moved[name] for name in after if name != "frozen"),
        "replicas_agree": agree,
        "state_bytes": int(held),
        "state_bytes_alone": whole,
        **watch.told(),
    }
    return {**told, "holds": holds(cell, told)}


def holds(cell, told):
    in_8_bits = is_in_8_bits(cell["optimizer"])
    of_parameter, of_movement = IN_8_BITS if in_8_bits else (OF_PARAMETER, OF_MOVEMENT)
    if cell["optimizer"] == "SSTAdamW":
        of_parameter, of_movement = DECOMPOSED
    limits = {"": of_parameter, "_of_movement": of_movement}
    held = told["replicas_agree"] and told["moved"] > 1e-3
    held &= all(told.get(f"replayed{of}", 0.0) <= limit for of, limit in limits.items())
    if is_bf16(cell) or in_8_bits or VARIANTS[cell["optimizer"]].jumps:
        return held
    return held and told["difference"] <= limits[""] and told["of_movement"] <= limits["_of_movement"]


def start():
    skip_inference_reduce()
    deepspeed.init_distributed("gloo")


def measure(cells):
    """Each cell with what it measured, at rank 0."""
    start()
    told = []
    for cell in cells:
        # as on a machine with GPUs, where the engine's processes speak through NCCL and offloaded tensors cannot
        dist.get_backend = (lambda group=None: "nccl") if cell.get("nccl") else BACKEND_OF
        reference = None
        if dist.get_rank() == 0 and dist.get_world_size() > 1 and "save" not in cell:  # which goes on elsewhere
            reference = torch.load(cell["alone"]) if "alone" in cell else alone(cell)
        result = run(cell, reference)
        told.append({**cell, **(result or {})})
    return told
