"""DistributedDataParallel with gradients that are freed in backward, beside itself with an ordinary step, on the
processes of a pool's job."""

import contextlib

import cells
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gracile import optim
from gracile.optim import exchange, keep_out_of_ddp, release_gradients
from gracile.optim.core.projected_gradient import ProjectedGradient
from gracile.optim.distributed import UnsupportedLayout
from gracile.optim.released import is_freed
from gracile.train.measurement.comm_bytes import Traffic

STEPS = 20


def start():
    cells.start()
    exchange.LOT_BYTES = 2000  # several lots, and tensors that are sent as they are


def apart(one, other):
    both = zip(one, other, strict=True)
    return max((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item() for a, b in both)


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

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.first = nn.Linear(24, 24)
        self.second, self.third, self.last = (nn.Linear(24, 24, bias=bias) for _ in range(3))
        self.fails_at = None

    def forward(self, x, left_out=()):
        if left_out == "weights":
            return x + self.first.bias + self.second.bias + self.third.bias + self.last.bias
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
    groups = optim.param_groups(net, rank=4, target_modules="all-linear", update_proj_gap=4, weight_decay=0.1)
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
        "second unused by all": {"left_out": ("second",), "find_unused_parameters": True},
        "second unused by one": {"left_out": ("second",) if dist.get_rank() else (), "find_unused_parameters": True},
        "second unused by one, four passes": {
            "left_out": ("second",) if dist.get_rank() else (), "find_unused_parameters": True, "passes": 4,
        },
    }  # fmt: skip
    for way, keys in ways.items():
        one = steps(None, **{key: value for key, value in keys.items() if key != "told"})[0]
        other, _, held = steps("coordinates", **keys)
        assert agree(other), way
        weights = {f"{name}.weight" for name in ("first", "second", "third", "last") if way != f"{name} unused by all"}
        if "scaled_at" not in keys:  # after which refreshes come a step later
            assert held == [weights if step % 4 or "told" in keys else set() for step in range(STEPS)], way
        told[way] = apart(one, other)
        if way.startswith("second unused") and "passes" not in keys:
            told[way, "nothing"] = apart(one, steps("nothing", **keys)[0])
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


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(dist.get_rank())
        self.scale = nn.Parameter(torch.ones(24))
        self.first, self.middle, self.last = (nn.Linear(24, 24) for _ in range(3))
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x * self.scale)))))


def named_otherwise():
    """The largest difference of a weight, at rank 0."""
    start()
    runs = []
    for keep in (None, "nothing"):
        net = Tied()
        optimizer = galore(net)
        ddp = wrapped(net, optimizer, keep)
        for step in range(6):
            loss_of(ddp, step).backward()
            assert keep is None or sum(not is_freed(p.grad) for p in net.parameters()) == 1
            optimizer.step()
            optimizer.zero_grad()
        runs.append(list(net.parameters()))
    return {"nothing": apart(*runs)}


class Checkpointed(Net):
    """Each layer in a reentrant checkpoint, whose backward pass is one of its own; the second one ``again`` in one."""

    def __init__(self, again=False):
        super().__init__()
        self.again = again

    def forward(self, x):
        x = x.clone().requires_grad_()
        for name in ("first", "second", "third", "last", *(("second",) if self.again else ())):
            x = checkpoint(nn.Sequential(getattr(self, name), nn.Tanh()), x, use_reentrant=True)
        return x


def checkpointed():
    """By what is kept the largest difference of a weight, and what is said of a layer in two checkpoints, at rank 0."""
    start()
    runs = {}
    for keep in (None, "coordinates", "nothing"):
        net = Checkpointed()
        optimizer = galore(net)
        ddp = wrapped(net, optimizer, keep)
        for step in range(6):
            with counted() as sizes:
                loss_of(ddp, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs[keep] = [p.detach() for p in net.parameters()], len(sizes)
    net = Checkpointed(again=True)
    ddp = wrapped(net, galore(net), "nothing")
    said = raised(RuntimeError, loss_of(ddp, 0).backward)
    plain = runs.pop(None)[0]
    return {keep: (apart(plain, weights), messages) for keep, (weights, messages) in runs.items()}, said


@contextlib.contextmanager
def counted():
    """The bytes of what is given to all-reduces, those below a tensor subclass too, of which a mode sees nothing."""
    sizes, inner = [], dist.all_reduce

    def all_reduce(tensor, *arguments, **keywords):
        sizes.append(tensor.nbytes)
        return inner(tensor, *arguments, **keywords)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = inner


def bytes_sent():
    """What a process sends of matrices at a refresh and in the step after it, and what is given to messages in a step
    without and with clipping; the first two for plain DDP, too. At rank 0."""
    cells.start()  # in lots of the usual size
    told = {}
    for keep in ("coordinates", None):
        net = nn.Sequential(*(nn.Linear(96, 96) for _ in range(4)))
        optimizer = optim.GaLoreAdamW(optim.param_groups(net, rank=8, target_modules="all-linear", update_proj_gap=4))
        ddp = wrapped(net, optimizer, keep)
        other = 2 * (dist.get_world_size() - 1) / dist.get_world_size() * sum(4 * layer.bias.numel() for layer in net)
        sent, given = [], []
        for step in range(8):
            with Traffic() as traffic, counted() as sizes:
                ddp(torch.randn(4, 96)).square().mean().backward()
                if step == 7:
                    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
            optimizer.zero_grad()
            sent.append(traffic.bytes - other)
            given.append(sizes)
        told[keep] = sent[4:6], given[6:]
    return told


def without_hooks():
    """By how much weights differ where a process has steps in which no gradient of what is exchanged comes, from plain
    DDP; and where passes are never summed and one process has none, from sums by hand. At rank 0."""
    start()
    runs = []
    for keep in (None, "coordinates"):
        net = Net()
        optimizer = galore(net)
        ddp = wrapped(net, optimizer, keep, find_unused_parameters=True)
        for step in range(7):
            biases = step in (2, 4, 5) and dist.get_rank() == 1
            loss_of(ddp, step, left_out="weights" if biases else ()).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(list(net.parameters()))
    return apart(*runs), never_summed()


def never_summed():
    net, by_hand = nn.Sequential(nn.Linear(24, 24, bias=False)), nn.Linear(24, 24, bias=False)
    net.spare = nn.Parameter(torch.ones(1))  # DDP's
    optimizer, other = galore(net), galore(nn.Sequential(by_hand))
    ddp = wrapped(net, optimizer, "coordinates")
    by_hand.load_state_dict(net[0].state_dict())
    for step in range(7):
        if not (step in (2, 4) and dist.get_rank() == 1):
            with ddp.no_sync():
                loss_of(ddp, step).backward()
            loss_of(by_hand, step).backward()
        G = torch.zeros(24, 24) if by_hand.weight.grad is None else by_hand.weight.grad
        dist.all_reduce(G.div_(dist.get_world_size()))
        by_hand.weight.grad = G
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    return apart([by_hand.weight], [net[0].weight])


def failures():
    """By how much weights differ after passes that failed, at different places on different processes, from those of a
    run without, at rank 0."""
    start()
    told = {}
    for keep in ("coordinates", "nothing"):
        runs = []
        for failing in (False, True):
            net = Net(bias=False)  # DDP's own go on after a failed pass where it has not come to them
            optimizer = galore(net)
            ddp = wrapped(net, optimizer, keep)
            for step in range(7):
                if failing and step in (3, 4):
                    failed_pass(net, ddp, optimizer, ("first", "third")[dist.get_rank() % 2])
                loss_of(ddp, step).backward()
                optimizer.step()
                optimizer.zero_grad()
                assert agree(net.parameters())
            runs.append([p.detach().clone() for p in net.parameters()])
        told[keep] = apart(*runs)
    return told


def failed_pass(net, ddp, optimizer, at):
    net.fails_at = at
    with contextlib.suppress(Failure):
        loss_of(ddp, 20).backward()
    optimizer.zero_grad()
    net.fails_at = None


# ---- checkpoints, hooks that are removed ----------------------------------------------------------------------------


def went_on(folder, keep, begin, end):
    """A run from one step to another: the batch is that of one process, and state comes from a file and goes to one.
    Returns the weights, and their difference from those of one process, at rank 0."""
    start()
    cell = {"optimizer": "GaLoreAdamW"}
    net = cells.build(cell, seed=dist.get_rank())
    optimizer = cells.make_optimizer(net, cell)
    if begin:
        saved = torch.load(f"{folder}/{begin}.pt")
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    ddp = wrapped(net, optimizer, keep)
    for step in range(begin, end):
        ddp(*cells.share(step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/{end}.pt")
    dist.barrier()
    alone = cells.alone({**cell, "steps": (0, end)})[1]
    return apart(list(alone.values()), [p.detach() for p in net.parameters()])


def removed():
    """Ordinary steps after ``remove``, with a new DDP: the difference, at rank 0; and what the old one says."""
    start()
    runs = []
    for keep in (None, "coordinates"):
        net = Net()
        optimizer = galore(net)
        if keep:
            keep_out_of_ddp(net, optimizer, keep)
        ddp = DistributedDataParallel(net)
        released = release_gradients(ddp, optimizer, keep) if keep else None
        for step in range(7):
            if step == 3 and keep:
                released.remove()
                said = raised(RuntimeError, lambda ddp=ddp: loss_of(ddp, 0))
                ddp = DistributedDataParallel(net)
            loss_of(ddp, step).backward()
            assert not (step > 2 and any(isinstance(p.grad, ProjectedGradient) for p in net.parameters()))
            optimizer.step()
            optimizer.zero_grad()
        runs.append(list(net.parameters()))
    return apart(*runs), said


# ---- what is refused ------------------------------------------------------------------------------------------------


def raised(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def refusals():
    """By what was done what was said, at rank 0."""
    start()
    rank, said = dist.get_rank(), {}

    def made(keep, **options):
        net = Net()
        optimizer = galore(net)
        if keep:
            keep_out_of_ddp(net, optimizer, keep)
        return DistributedDataParallel(net, **options), optimizer

    ddp, optimizer = made(None)
    said["owned"] = raised(UnsupportedLayout, lambda: release_gradients(ddp, optimizer))
    said["too late"] = raised(UnsupportedLayout, lambda: keep_out_of_ddp(ddp, optimizer))
    said["whole"] = raised(UnsupportedLayout, lambda: release_gradients(ddp.module, optimizer))
    ddp, optimizer = made("coordinates")
    said["for another"] = raised(UnsupportedLayout, lambda: release_gradients(ddp, optimizer, "nothing"))
    ddp, optimizer = made("coordinates")
    loss_of(ddp, 0).backward()
    said["not released"] = raised(RuntimeError, optimizer.step)
    ddp, optimizer = made("coordinates")
    told = None if rank else 1
    said["disagreement"] = raised(ValueError, lambda: release_gradients(ddp, optimizer, passes=told))
    fira = optim.FiraAdamW(optim.param_groups(ddp.module, rank=4, target_modules="all-linear"))
    said["fira"] = raised(UnsupportedLayout, lambda: keep_out_of_ddp(Net(), fira))
    ddp, optimizer = made("nothing")
    release_gradients(ddp, optimizer, "nothing")
    with ddp.no_sync():
        said["no_sync"] = raised(RuntimeError, lambda: loss_of(ddp, 0))
    loss_of(ddp, 0).backward()
    norm = nn.utils.clip_grad_norm_(ddp.parameters(), torch.inf)
    assert agree([norm])
    said["clipped"] = raised(RuntimeError, lambda: nn.utils.clip_grad_norm_(ddp.parameters(), 1e-3))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    said["scaled"] = raised(RuntimeError, lambda: scaler.unscale_(optimizer))
    said["second pass"] = raised(RuntimeError, lambda: loss_of(ddp, 1).backward())
    compiled = torch.compile(made("nothing")[0], backend="eager")
    said["compiled"] = raised(UnsupportedLayout, lambda: release_gradients(compiled, optimizer, "nothing"))
    return said
