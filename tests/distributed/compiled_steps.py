"""A step that is compiled, under FSDP2 on the processes of a pool's job, beside one that is not."""

import cells
import torch
import torch._dynamo.testing
import torch.distributed as dist
from fsdp_checkpoints import split, train

STEPS = 7  # refreshes at 0, 3, 5 and 6, other masks at 4


class Compiled:
    """An optimizer whose ``step`` is a compiled function of it."""

    def __init__(self, optimizer):
        self.counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        self.step = torch.compile(lambda: optimizer.step(), backend=self.counter)
        self.zero_grad = optimizer.zero_grad


def compare(cell):
    """Whether both end with the same bits on all processes, and how many graphs were compiled."""
    torch._dynamo.reset()
    (net, optimizer), (twin, plain) = split(cell), split(cell)
    compiled = Compiled(optimizer)
    train(net, compiled, 0, STEPS)
    train(twin, plain, 0, STEPS)
    pairs = zip(net.parameters(), twin.parameters(), strict=True)
    same = all(torch.equal(p.detach().to_local(), q.detach().to_local()) for p, q in pairs)
    flag = torch.tensor(float(same))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag), compiled.counter.frame_count


def measure(todo):
    cells.start()
    return [compare(cell) for cell in todo]
