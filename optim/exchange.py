"""Gradients, or what is kept of them, averaged over the processes of DistributedDataParallel by hooks.

    hook of a parameter     its lot is ready, and so are all lots before it: it is sent, while the pass goes on
    a lot has arrived       each of its parameters has the mean, and may move or be reduced
    end of the pass         what is left is sent, zeros for what was not used here
    step()                  the same, on a process where no hook ran

Lots are of the same parameters on all processes and in one order, the last registered first. A lot is waited for before
the second one after it is sent, and so at the same place of that order everywhere. They have a process group of their
own: DistributedDataParallel's messages come in an order that may be another one where graphs differ.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from .core.projected_gradient import ProjectedGradient
from .kept_out_of_ddp import names_in_ddp

LOT_BYTES = 2**22  # what is smaller is packed, until there is as much; what is larger is sent as it is
WAITING = 2  # lots on their way
AGAIN = (
    "the gradient of a parameter of shape {shape} came twice in one backward pass, and what came first may have been "
    "sent: a layer in two reentrant checkpoints does so; give use_reentrant=False"
)
JOINED = "processes with different numbers of batches (DistributedDataParallel.join) are not in step with the exchange"
REMOVED = (
    "this DistributedDataParallel leaves parameters out, and remove() has ended what summed their gradients; build a "
    "new one of the same model"
)


class Exchange:
    """The gradients of some parameters of ``ddp``, averaged. Created by all of its processes, with equal arguments.

    Args:
        lots: the parameters in the order in which they are sent, some at a time.
        blank: the gradient, or what is kept of it, of a parameter that was not used here: zeros.
        arrived: called with each parameter that has the mean for a gradient, in the order of ``lots``.
        dropped: called when a pass that failed has been ended, of which some parameters may have arrived.
        refused_pass: what is said to a pass that is not to be summed (``no_sync``); None where such may come before
            the one that is.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        lots: Sequence[Sequence[Tensor]],
        blank: Callable[[Tensor], Tensor],
        arrived: Callable[[Tensor], None],
        dropped: Callable[[], None],
        refused_pass: str | None,
    ) -> None:
        self.lots, self.blank, self.arrived = lots, blank, arrived
        self.dropped, self.refused_pass = dropped, refused_pass
        self.lot_of = {p: number for number, lot in enumerate(lots) for p in lot}
        self.group = dist.new_group()  # of a name of its own, also after one that was destroyed
        self.on_way: deque[tuple[Sequence[Tensor], list[Tensor], Message]] = deque()
        self.synced: bool | None = None  # whether the passes that are under way are to be summed; None: not told
        self.is_open = False  # a round of all lots
        self.is_done = False  # since the last step
        self.sent, self.missing, self.ready = 0, [0], set[Tensor]()
        self.ddp = ddp
        self.handles = [ddp.register_forward_pre_hook(self._before), ddp.register_forward_hook(self._after)]
        for p in self.lot_of:
            _make_alike(p, self.group)

    def give(self, p: Tensor) -> None:
        """A pass has left ``p`` its gradient."""
        if not self.synced:
            self.is_done = False
            return
        self._open_in_pass()
        if p in self.ready:
            raise RuntimeError(AGAIN.format(shape=tuple(p.shape)))
        self.ready.add(p)
        self.missing[self.lot_of[p]] -= 1
        while self.sent < len(self.lots) and not self.missing[self.sent]:
            self._send()

    @torch.no_grad()
    def finish(self) -> None:
        """The rest of a round."""
        if self.is_open:
            while self.sent < len(self.lots):
                self._send()
            while self.on_way:
                self._receive()
            self.is_open, self.is_done = False, True

    def before_step(self) -> None:
        """What this step moves by, where no pass has summed it."""
        if not (self.is_open or self.is_done):
            self._open()
        self.finish()

    def after_step(self, *_: Any) -> None:
        self.is_done = False

    def sum_outsides(self) -> None:
        """What the norms of this step are told by, as one message. All processes read norms, or none."""
        waiting = [p.grad for p in self.lot_of if isinstance(p.grad, ProjectedGradient) and p.grad.complete is not None]
        for gradient in waiting:
            gradient.complete = None
        outsides = [gradient.kept.outside for gradient in waiting]
        for alike in _by_kind(outsides):
            Message(alike, [True] * len(alike), self.group).wait()

    def remove(self) -> None:
        """The end of the exchange: the model's DistributedDataParallel is of no use any more, and says so."""
        for handle in self.handles:
            handle.remove()
        for p, names in names_in_ddp(self.ddp.module).items():
            if p in self.lot_of:
                self.ddp.parameters_to_ignore.difference_update(names)
        self.ddp.module._ddp_params_and_buffers_to_ignore = sorted(self.ddp.parameters_to_ignore)
        self.ddp.register_forward_pre_hook(_refuse)
        if dist.is_initialized():
            dist.destroy_process_group(self.group)

    # ---- passes -----------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def _before(self, ddp: DistributedDataParallel, *_: Any) -> None:
        """As DDP, which is told at the forward pass whether the backward pass is to be summed."""
        if not torch.is_grad_enabled():
            return
        if ddp._join_config.enable:
            raise RuntimeError(JOINED)
        if not ddp.require_backward_grad_sync and self.refused_pass is not None:
            raise RuntimeError(self.refused_pass)
        self.abandon()
        self.synced = ddp.require_backward_grad_sync

    @torch._disable_dynamo
    def _after(self, ddp: DistributedDataParallel, _: Any, output: Any) -> None:
        """A round opens when the backward pass comes to what the model gave: also where no hook of a parameter runs,
        and outside of reentrant checkpoints, whose own passes end before all gradients are there."""
        if torch.is_grad_enabled() and self.synced:
            leaves: list[Any] = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            for leaf in leaves:
                if leaf.requires_grad:
                    leaf.register_hook(self._open_in_pass)

    def _open_in_pass(self, _: Any = None) -> None:
        if not self.is_open:
            self._open()
            Variable._execution_engine.queue_callback(self.finish)

    def _open(self) -> None:
        self.is_open, self.sent = True, 0
        self.missing, self.ready = [len(lot) for lot in self.lots], set()

    @torch.no_grad()
    def abandon(self) -> None:
        """The end of a round that a pass left which failed, if there is one. Other processes may wait for its lots,
        and get no numbers where they have not failed. What has arrived at one of them is taken by all: it may have
        moved there."""
        if not self.is_open:
            return
        received, sent = self.sent - len(self.on_way), self.sent
        of_all = torch.tensor(received, device=self.lots[0][0].device)
        for lot in self.lots[sent:]:
            parts = [_sent_of(self.blank(p)).fill_(torch.nan) for p in lot]
            self.on_way.append((lot, parts, Message(parts, [True] * len(lot), self.group)))
        dist.all_reduce(of_all, dist.ReduceOp.MAX, group=self.group)
        for _ in range(int(of_all) - received):
            self._receive()
        while self.on_way:
            self.on_way.popleft()[2].wait()
        self.is_open = False
        self.dropped()

    # ---- lots -------------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        while len(self.on_way) >= WAITING:
            self._receive()
        lot = self.lots[self.sent]
        used = [p.grad is not None for p in lot]
        gradients = [self.blank(p) if p.grad is None else p.grad for p in lot]
        self.on_way.append((lot, gradients, Message(list(map(_sent_of, gradients)), used, self.group)))
        self.sent += 1

    def _receive(self) -> None:
        lot, gradients, message = self.on_way.popleft()
        for p, gradient, used in zip(lot, gradients, message.wait(), strict=True):
            if not used:  # by any process
                continue
            p.grad = gradient
            if isinstance(gradient, ProjectedGradient):
                gradient.complete = self.sum_outsides
            self.arrived(p)


class Message:
    """Tensors of one device on their way to become the means over processes: small ones, and for each whether it was
    ``used`` here, as one."""

    def __init__(self, parts: Sequence[Tensor], used: Sequence[bool], group: Any) -> None:
        self.used = used
        self.small = [part for part in parts if part.nbytes < LOT_BYTES]
        self.large = [(part, part.contiguous()) for part in parts if part.nbytes >= LOT_BYTES]
        flags = parts[0].new_ones(len(parts)) if all(used) else parts[0].new_tensor([float(flag) for flag in used])
        self.packed = torch.cat([*(part.reshape(-1) for part in self.small), flags])
        of_each = 1.0 / dist.get_world_size(group)  # DDP's own factor, before the sum
        sent = [*(own for _, own in self.large), self.packed]
        self.works = [dist.all_reduce(own.mul_(of_each), group=group, async_op=True) for own in sent]

    def wait(self) -> list[bool]:
        """Put the means in their places. Returns for each tensor whether some process has used it."""
        for work in self.works:
            work.wait()
        for part, own in self.large:
            if own is not part:
                part.copy_(own)
        sizes = [*(part.numel() for part in self.small), len(self.used)]
        *means, flags = torch.split(self.packed, sizes)
        for part, mean in zip(self.small, means, strict=True):
            part.copy_(mean.view(part.shape))
        return list(self.used) if all(self.used) else [flag != 0 for flag in flags.tolist()]  # not a number is one


def in_lots(parameters: Iterable[Tensor], nbytes: Callable[[Tensor], int]) -> list[list[Tensor]]:
    """Parameters in a row, as many as make a lot of what is sent of them."""
    lots: list[list[Tensor]] = []
    filled = LOT_BYTES
    for p in parameters:
        if filled >= LOT_BYTES or (p.dtype, p.device) != (lots[-1][0].dtype, lots[-1][0].device):
            lots.append([])
            filled = 0
        lots[-1].append(p)
        filled += nbytes(p)
    return lots


def _sent_of(gradient: Tensor) -> Tensor:
    return gradient.kept.coordinates if isinstance(gradient, ProjectedGradient) else gradient


@torch.no_grad()
def _make_alike(p: Tensor, group: Any) -> None:
    """The weights of the first process on all, as DDP has them of what it sums."""
    whole = p.detach().contiguous()
    dist.broadcast(whole, 0, group=group)
    if whole.data_ptr() != p.data_ptr():
        p.copy_(whole)


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


def _refuse(*_: Any) -> None:
    raise RuntimeError(REMOVED)
