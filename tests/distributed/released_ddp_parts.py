"""DistributedDataParallel with gradients that are freed in backward, beside itself with an ordinary step, on the
processes of a pool's job."""

import contextlib

import cells
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gracile import optim
from gracile.optim import exchange, keep_out_of_ddp, release_gradients
from gracile.optim.core.projected_gradient import ProjectedGradient
from gracile.optim.distributed import UnsupportedLayout
from gracile.optim.released import is_freed
from gracile.train.measurement.comm_bytes import Traffic

STEPS = 13


def start():
    cells.start()
    exchange.LOT_BYTES = 2000  # several lots, and tensors that are sent as they are


def apart(one, other):
    return max((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item() for a, b in zip(one, other))


def wrapped(net, optimizer, keep, passes=None, **options):
    if keep is not None:
        keep_out_of_ddp(net, optimizer, keep)
    ddp = DistributedDataParallel(net, **options)
    if keep is not None:
        release_gradients(ddp, optimizer, keep, passes=passes)
    return ddp


# ---- classes of the catalogue ---------------------------------------------------------------------------------------


def trained(cell, keep):
    net = cells.build(cell)
    optimizer = cells.make_optimizer(net, cell)
    if dist.get_rank():
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.5)  # all begin with the weights of the first
    ddp = wrapped(net, optimizer, keep)
    for step in range(STEPS):
        ddp(*cells.share(step, 0)).backward()
        if keep == "nothing":
            assert sum(not is_freed(p.grad) for p in net.parameters() if p.requires_grad) == 1  # DDP's own
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in net.parameters()]


def compare(tasks):
    """By cell the largest difference of a parameter, in parts of it, at rank 0."""
    start()
    told = {}
    for cell, keep in tasks:
        told[cell["optimizer"], keep] = apart(trained(cell, None), trained(cell, keep))
    return told


# ---- passes, norms, what is not used --------------------------------------------------------------------------------


class Net(nn.Module):
    """Layers of which some may be left out, here or on every process, or a pass made to fail."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.first, self.second, self.third, self.last = (nn.Linear(24, 24) for _ in range(4))
        self.fails_at = None

    def forward(self, x, left_out=()):
        for name in ("first", "second", "third", "last"):
            if name not in left_out:
                x = torch.tanh(getattr(self, name)(x))
            if name == self.fails_at:
                x.register_hook(_fail)
        return x


class Failure(Exception):
    pass


def _fail(_):
    raise Failure


def galore(net, **keys):
    groups = optim.param_groups(net, rank=4, target_modules="all-linear", update_proj_gap=4)
    return optim.GaLoreAdamW(groups, lr=0.01, **keys)


def loss_of(ddp, step, micro=0, **keys):
    chance = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
    x, y = torch.randn(8, 24, generator=chance), torch.randint(24, (8,), generator=chance)
    return cross_entropy(ddp(x, **keys), y)


def steps(keep, passes=1, told=None, clip=0.0, left_out=(), scaled_at=None, **options):
    """Weights after some steps, the norms of their gradients, and what is there of gradients before a step."""
    net = Net()
    optimizer = galore(net)
    ddp = wrapped(net, optimizer, keep, told, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=scaled_at is not None)
    norms, held = [], []
    for step in range(STEPS):
        for micro in range(passes):
            with ddp.no_sync() if micro + 1 < passes else contextlib.nullcontext():
                loss = loss_of(ddp, step, micro, left_out=left_out) / passes
                scaler.scale(loss * torch.inf if (step, dist.get_rank()) == (scaled_at, 1) else loss).backward()
        held.append({name for name, p in net.named_parameters() if isinstance(p.grad, ProjectedGradient)})
        scaler.unscale_(optimizer)
        if clip:
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), clip))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [p.detach() for p in net.parameters()], norms, held


def agree(tensors):
    """Whether they are the same to the bit on all processes."""
    mine = torch.cat([tensor.reshape(-1) for tensor in tensors])
    first = mine.clone()
    dist.broadcast(first, 0)
    same = torch.tensor(float(torch.equal(mine, first)))
    dist.all_reduce(same, dist.ReduceOp.MIN)
    return bool(same)


def passes():
    """By what was done the largest difference of a weight, at rank 0; all processes must agree."""
    start()
    told = {}
    ways = {
        "one pass": {}, "subspaces found in the pass": {"told": 1}, "four passes": {"passes": 4},
        "an overflow": {"scaled_at": 6}, "an overflow at a refresh": {"scaled_at": 4},
        "an overflow where subspaces are found": {"scaled_at": 4, "told": 1},
        "unused parameters looked for": {"passes": 2, "find_unused_parameters": True},
        "a static graph": {"static_graph": True}, "views of buckets": {"gradient_as_bucket_view": True},
        "unused by all": {"left_out": ("second",), "find_unused_parameters": True},
        "unused by one": {"left_out": ("second",) if dist.get_rank() else (), "find_unused_parameters": True},
        "unused by one, four passes": {
            "left_out": ("second",) if dist.get_rank() else (), "find_unused_parameters": True, "passes": 4,
        },
    }  # fmt: skip
    for way, keys in ways.items():
        one = steps(None, **{key: value for key, value in keys.items() if key != "told"})[0]
        other, _, held = steps("coordinates", **keys)
        assert agree(other), way
        weights = {f"{name}.weight" for name in ("first", "second", "third", "last")} - (
            {"second.weight"} if way == "unused by all" else set()
        )
        assert held == [weights if step % 4 or "told" in keys else set() for step in range(STEPS)] or "over" in way, held
        told[way] = apart(one, other)
        if way.startswith("unused by"):
            told[way, "nothing"] = apart(one, steps("nothing", **keys)[0]) if "four" not in way else 0.0
    return told


def norms():
    """The largest error of a norm with one pass a step and with four, and the largest difference where it is of whole
    gradients, at rank 0."""
    start()
    found = []
    for keys in ({}, {"told": 1}, {"passes": 4}):
        plain = steps(None, passes=keys.get("passes", 1), clip=1e9)[1]
        weights, known, _ = steps("coordinates", clip=1e9, **keys)
        steps("coordinates", clip=0.01, **keys)
        assert agree(weights + known)
        errors = (torch.stack(known) / torch.stack(plain) - 1).abs()
        found.append((errors.max().item(), errors[::4].max().item()))
    one, other = steps(None, clip=0.05)[0], steps("coordinates", clip=0.05)[0]
    return found, apart(one, other)
