"""Gradients that are freed in the backward pass which makes them.

    released = release_gradients(model, optimizer, keep="nothing")
    loss.backward()      # each parameter moves when its gradient is there, and the gradient is freed
    optimizer.step()     # what concerns several parameters together; the end of the step
    optimizer.zero_grad()

A hook of each parameter, which autograd calls when the gradient is complete and the layer's own input gradient was
taken, asks the one optimizer to move this parameter: to the bit what ``step()`` does to it on a CPU. (An optimizer for
each parameter, as published code has it, counts positions and budgets anew in each, and is another method.) In the
place of each freed gradient lies a ``FreedGradient``, of no memory, which has its norm for the log and refuses whatever
else would read it: global clipping, GradScaler and a second backward pass in a step would without it work on nothing,
and say nothing.

    released = release_gradients(model, optimizer, keep="coordinates")

keeps what a matrix moves by, G P or the entries of its mask, and frees G, but in steps in which it needs all of G for a
new P (with ``passes=1`` then too) or for another mask.
Parameters move in ``step()``, so that passes add up, clipping and ``GradScaler`` scale what is kept
(``ProjectedGradient``), and a step can be skipped.

    keep_out_of_ddp(model, optimizer, keep="coordinates")
    ddp = DistributedDataParallel(model)
    released = release_gradients(ddp, optimizer, keep="coordinates")

sums over processes what the hooks make: coordinates, or gradients of which each parameter moves when the sum is there
(``Exchange``).

    loss, norm = released.clipped_backward(closure, max_norm=1.0)

clips by the exact norm of all gradients with ``nothing`` too, in two passes over the batch (``Clipping``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..validation import one_of, require
from .clipping import Clipping, same_random_numbers
from .core.freed_gradient import FreedGradient, is_freed
from .core.optimizer import EARLY, ShardedOptimizer
from .core.projected_gradient import ProjectedGradient, local_of
from .core.types import Group
from .distributed import UnsupportedLayout, is_dtensor
from .exchange import LOT_BYTES, WAITING, Exchange, in_lots
from .kept_out_of_ddp import (
    COORDINATES,
    KEEPS,
    NOTHING,
    check_agreement,
    end_guard,
    exchanged,
    left_to_exchange,
    needs_all,
    refused_of_ddp,
)

TWICE = (
    "the gradient of a parameter of shape {shape} came again before optimizer.step(), and the parameter has moved: "
    "several passes a step need gradients that are kept; so does a layer in two reentrant checkpoints "
    "(use_reentrant=False); after a pass that failed call optimizer.zero_grad()"
)
MORE_PASSES = (
    "a second backward pass came before optimizer.step(), where release_gradients was told passes=1; leave passes out "
    "to add several up"
)
NO_SYNC = (
    "a pass under no_sync() adds to what later passes bring, and with keep='nothing' each parameter moves in the pass; "
    "give keep='coordinates', or one pass a step"
)
NO_GRADIENT = (
    "no gradient came of the closure; it runs forward and backward, as in loss.backward(), and returns the loss"
)
NOT_FINITE = (
    "the norm of all gradients is {norm}, and nothing has moved; leave error_if_nonfinite out to go on without the step"
)


def _freed(p: Tensor) -> Tensor:
    """What lies in the place of a parameter's gradient."""
    assert p.grad is not None
    return _with_local(p, FreedGradient(local_of(p), torch.linalg.vector_norm(local_of(p.grad))))


def _with_local(p: Tensor, local: Tensor) -> Tensor:
    """A gradient of ``p`` of which this process holds ``local``."""
    if not is_dtensor(p):
        return local
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _is_view(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.nbytes


class ReleasedGradients:
    """The hooks of a model and its optimizer; ``remove`` takes them away. ``clipped_backward`` clips in two passes."""

    def __init__(
        self,
        optimizer: ShardedOptimizer,
        keep: str,
        passes: int | None = None,
        ddp: DistributedDataParallel | None = None,
    ) -> None:
        self.keep, self.passes = keep, passes
        self.optimizer, hook = optimizer, self._move if keep == NOTHING else self._project
        self.handles: list[RemovableHandle] = []
        self.clipping: Clipping | None = None  # of the passes that are under way
        self.groups: dict[Tensor, Group] = {}
        for group in optimizer.param_groups:
            self.groups |= {p: group for p in group["params"] if p.requires_grad}
        self.exchange = None if ddp is None else self._exchange(ddp, keep)
        hooked: list[Any] = [*(self.groups if self.exchange is None else self.exchange.lot_of)]
        self.not_hooked = [p for p in self.groups if p not in set(hooked)]  # DDP's own
        for p in hooked:
            self.handles.append(p.register_post_accumulate_grad_hook(hook))
        self.handles.append(optimizer.register_step_pre_hook(self._check))
        if self.exchange is not None:
            self.handles.append(optimizer.register_step_post_hook(self.exchange.after_step))

    def _exchange(self, ddp: DistributedDataParallel, keep: str) -> Exchange:
        parameters = reversed(left_to_exchange(ddp, self.optimizer).values())  # about as a pass comes to them
        lots = in_lots(parameters, partial(self._nbytes, keep))
        if keep == NOTHING:
            return Exchange(ddp, lots, torch.zeros_like, self._have_gradient, self.optimizer.zero_grad, NO_SYNC)
        blank, arrived = self._no_coordinates, self._have_coordinates
        return Exchange(ddp, lots, blank, arrived, self.optimizer.zero_grad, None)

    def _nbytes(self, keep: str, p: Tensor) -> int:
        reduced = keep == COORDINATES and self.optimizer.is_for_matrices(self.groups[p])
        return p.element_size() * (self.optimizer.reduced_size(p, self.groups[p]) if reduced else p.numel())

    def remove(self) -> None:
        """Gradients stay again, until ``step`` has used them."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.exchange is not None:
            self.exchange.remove()
        self._clear()

    @property
    def most_bytes(self) -> int:
        """Of the gradients that this process has at the same time, at most."""
        sizes: list[int] = [local_of(p).nbytes for p in self.groups]
        return min(sum(sizes), kept_bytes(self.optimizer, self.keep, self.passes) + max(sizes, default=0))

    def clipped_backward(
        self, closure: Callable[[], Any], max_norm: float, *, error_if_nonfinite: bool = False
    ) -> tuple[Any, Tensor]:
        """With ``keep="nothing"``, one step's passes, clipped by the norm of all gradients as
        ``torch.nn.utils.clip_grad_norm_`` clips. ``optimizer.step()`` comes after it.

        Forward and backward run twice over the batch, with the same random numbers of torch: first only norms stay of
        gradients, and then each parameter moves by its gradient times min(1, max_norm / (norm + 1e-6)). Buffers that a
        forward pass moves, such as those of BatchNorm, move twice.

        Args:
            closure: runs forward and backward and returns the loss, as closures of ``torch.optim`` do.
            max_norm: above 0; infinity clips nothing.
            error_if_nonfinite: raise for a norm that is infinite or not a number. Otherwise there is no second pass:
                nothing moves, also not in ``step()``, as after an overflow that ``GradScaler`` found.

        Returns:
            What ``closure`` returned last, and the norm before clipping, of no dimension and in fp32 at least, equal on
            all processes. Under FSDP2 it is that of all shards.

        Raises:
            ValueError: for another ``max_norm``, or ``keep="coordinates"``, whose gradients ``clip_grad_norm_`` takes.
            RuntimeError: where ``closure`` makes no gradients, or runs several passes; for ``error_if_nonfinite``.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from gracile.optim import GaLoreAdamW, param_groups, release_gradients
            >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
            >>> optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
            >>> released = release_gradients(model, optimizer, keep="nothing")
            >>> batch = torch.randn(16, 64)
            >>> def closure():
            ...     loss = model(batch).square().mean()
            ...     loss.backward()
            ...     return loss
            >>> loss, norm = released.clipped_backward(closure, max_norm=1.0)
            >>> optimizer.step()
            >>> optimizer.zero_grad()
        """
        require(self.keep == NOTHING, "keep must be 'nothing'; of coordinates clip_grad_norm_ works", self.keep)
        require(max_norm > 0, "max_norm must be above 0", max_norm)
        self.clipping = Clipping()
        try:
            return self._two_passes(self.clipping, closure, max_norm, error_if_nonfinite)
        except Exception:
            if self.exchange is not None:  # now, and not at the next pass: what is on its way is this one's
                self.exchange.abandon()
            raise
        finally:
            self.clipping = None

    def _two_passes(
        self, clipping: Clipping, closure: Callable[[], Any], max_norm: float, error_if_nonfinite: bool
    ) -> tuple[Any, Tensor]:
        with same_random_numbers(self.groups):
            loss = closure()
        with torch.no_grad():
            for p in self.not_hooked:
                if p.grad is not None:
                    clipping.measure(p)
            norm = clipping.total_norm(self.groups)
        if not clipping.norms:
            raise RuntimeError(NO_GRADIENT)
        if not torch.isfinite(norm):
            if error_if_nonfinite:
                raise RuntimeError(NOT_FINITE.format(norm=norm.item()))
            return loss, norm
        clipping.scale_to(norm, max_norm)
        loss = closure()
        with torch.no_grad():
            for p in self.not_hooked:
                if p.grad is not None:
                    clipping.scale(p)
        return loss, norm

    @torch.no_grad()
    def _move(self, p: Tensor) -> None:
        measured = self.clipping is not None and self.clipping.has_measured(p)
        if measured or self.optimizer.has_moved_early(p):
            p.grad = None
            raise RuntimeError(TWICE.format(shape=tuple(p.shape)))
        if self.exchange is None:
            self._have_gradient(p)
        else:
            self.exchange.give(p)

    def _have_gradient(self, p: Tensor) -> None:
        """All of it, of all processes."""
        with self.optimizer.phase(EARLY):
            self._take(p)

    def _take(self, p: Tensor) -> None:
        if self.clipping is not None and self.clipping.measures:
            self.clipping.measure(p)
            return
        if self.clipping is not None:
            self.clipping.scale(p)
        freed = _freed(p)  # before a method may use up the gradient
        self.optimizer.move_early(p)
        p.grad = freed

    @torch.no_grad()
    def _project(self, p: Tensor) -> None:
        if isinstance(local_of(p.grad), ProjectedGradient):  # to which the pass was added
            if self.passes is not None:
                raise RuntimeError(MORE_PASSES)
            if self.exchange is not None:
                self.exchange.give(p)
            return
        if self.exchange is not None:
            self._reduce(p, refresh=False)
            self.exchange.give(p)
        else:
            self._reduce(p, refresh=self.passes is not None)

    def _reduce(self, p: Tensor, refresh: bool) -> None:
        """``refresh``: what there is is the gradient of a whole step."""
        assert p.grad is not None
        with self.optimizer.phase(EARLY), torch.autocast(p.device.type, enabled=False):
            reduce = self.optimizer.reduction_of(p, self.groups[p], refresh)
            if reduce is not None:
                whole = self.exchange is None or refresh  # or it is one process's part of a sum
                made = ProjectedGradient.of if whole else ProjectedGradient.of_part
                p.grad = _with_local(p, made(local_of(p.grad), reduce))
            elif is_dtensor(p) and _is_view(local_of(p.grad)):
                p.grad = _with_local(p, local_of(p.grad).clone())  # FSDP2's are views of one tensor for a layer

    # ---- under DistributedDataParallel

    def _no_coordinates(self, p: Tensor) -> Tensor:
        """Of a parameter that no pass of this process has used."""
        held, p.grad = p.grad, torch.zeros_like(p)
        self._reduce(p, refresh=False)
        blank, p.grad = p.grad, held
        return blank

    def _have_coordinates(self, p: Tensor) -> None:
        """The sum over processes is there; where a subspace is due, it is that of whole gradients."""
        if self.passes is not None and not isinstance(p.grad, ProjectedGradient):
            self._reduce(p, refresh=True)

    def _check(self, *_: Any) -> None:
        """Before the step's end."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self.groups:
                    raise UnsupportedLayout(
                        "a parameter of the optimizer is another one than when release_gradients was called, so that "
                        "its gradient was kept; call it after fully_shard, and after add_param_group"
                    )
        if self.exchange is not None:
            self.exchange.before_step()
        self._clear()

    def _clear(self) -> None:
        """Of what was freed nothing is left to be moved by."""
        for p in self.groups:
            if is_freed(p.grad):
                p.grad = None


def release_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: str = COORDINATES, *, passes: int | None = None
) -> ReleasedGradients:
    """Free each gradient in the backward pass that makes it. ``optimizer.step()`` is called as ever, after it.

    Args:
        model: what ``backward`` goes through; under FSDP2 after ``fully_shard``, or what DistributedDataParallel made
            of a model after ``keep_out_of_ddp``. Then all processes call this together, and have the first one's
            weights of what DDP does not see.
        optimizer: of this package, for parameters of ``model``.
        keep: ``coordinates``: of a matrix with a subspace G P, between its refreshes, of one with a mask the entries of
            it, but where gradients say how it changes; of others all. For classes whose rule needs no more: GaLore's,
            8-bit ones too, and SET's, RigL's and their like. Passes add up, clipping and ``GradScaler`` work; the norm
            is exact after one pass of one process, and after several to some percent (1 and 4, where it was measured;
            of masks of rows of some dozen weights 12).
            ``nothing``: the parameter moves at once, of every class. What concerns several parameters together (pruning
            of a group, merges of factors) comes in ``step()``. Both to the bit of the ordinary step on a CPU,
            coordinates to rounding where they are added or scaled, and experts with exact vectors likewise in a step in
            which some wait for their first token. Sums over more than two processes round in another order than DDP's.
            Both on one process and under DDP and FSDP2.
        passes: 1, where each step has one backward pass: then new subspaces too are found in it, and of all gradients
            with a subspace one is there at a time. None keeps those that a subspace is due from until all passes have
            added up: of all matrices in the same step, or in turns, where their group has ``refreshes_at_once``, and
            then the first subspaces, which come out of turn, are found from the first pass. With ``nothing`` there is
            one pass anyhow.

    Returns:
        What ``remove()`` ends it by, and with ``nothing`` ``clipped_backward()`` clips by the norm of all gradients.

    Raises:
        ValueError: for another ``keep``, ``passes`` that are not 1, or processes that were told different things.
        TypeError: for an optimizer of another package.
        UnsupportedLayout: under DeepSpeed, which owns gradients; for a DistributedDataParallel that sums whole ones; in
            several processes with whole parameters that are not in one; with ``capturable``; of coordinates, for a
            class that needs more. Later, from ``step()``, where parameters were replaced since.
        RuntimeError: later, where something reads a gradient that was freed, as with ``nothing`` global clipping
            (but ``clipped_backward``), GradScaler and a second pass in one step do, ``no_sync`` among it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gracile.optim import GaLoreAdamW, param_groups, release_gradients
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
        >>> released = release_gradients(model, optimizer, keep="nothing")
        >>> model(torch.randn(16, 64)).square().mean().backward()
        >>> model[0].weight.grad
        FreedGradient((32, 64))
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """
    one_of(*KEEPS)("keep", keep)
    require(passes in (None, 1), "passes must be 1, or None for as many as there are", passes)
    if not isinstance(optimizer, ShardedOptimizer):
        raise TypeError(f"release_gradients needs an optimizer of gracile.optim, got {type(optimizer).__name__}")
    end_guard(optimizer)
    complaints: list[Callable[..., str | None]] = [_split_by_deepspeed, _summed_later, _captured]
    ddp = model if isinstance(model, DistributedDataParallel) else None
    if ddp is not None:
        order = {name: tuple(p.shape) for name, p in left_to_exchange(ddp, optimizer).items()}
        check_agreement(ddp, {"keep": keep, "passes": passes, "exchanged parameters": order})
        complaints.append(partial(refused_of_ddp, keep=keep))
    for complaint in [*complaints, *([_needs_all] if keep == COORDINATES else [])]:
        reason = complaint(model, optimizer)
        if reason is not None:
            raise UnsupportedLayout(reason)
    return ReleasedGradients(optimizer, keep, passes, ddp)


def _parameters(optimizer: ShardedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _split_by_deepspeed(model: nn.Module, optimizer: ShardedOptimizer) -> str | None:
    of_engine = type(model).__module__.partition(".")[0] == "deepspeed"
    if of_engine or any(hasattr(p, "ds_id") for p in [*model.parameters(), *_parameters(optimizer)]):
        return "DeepSpeed owns the gradients of its parameters: use DistributedDataParallel or FSDP2, or one process"
    return None


def _summed_later(model: nn.Module, optimizer: ShardedOptimizer) -> str | None:
    if isinstance(model, DistributedDataParallel):
        return None
    if isinstance(getattr(model, "_orig_mod", None), DistributedDataParallel):
        return "one compiled graph of DistributedDataParallel hands all gradients over at its end; compile its layers"
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and not all(map(is_dtensor, _parameters(optimizer))):
        return (
            "several processes hold whole parameters, and this model does not sum their gradients; give "
            "release_gradients what DistributedDataParallel made of it, after keep_out_of_ddp(model, optimizer), or "
            "call it after fully_shard"
        )
    return None


def _captured(model: nn.Module, optimizer: ShardedOptimizer) -> str | None:
    if any(group["capturable"] for group in optimizer.param_groups):
        return "capturable=True is for a step in a CUDA graph, of which nothing moves in a backward pass; leave it out"
    return None


def _needs_all(model: nn.Module, optimizer: ShardedOptimizer) -> str | None:
    return needs_all(optimizer)


def kept_bytes(optimizer: torch.optim.Optimizer, keep: str, passes: int | None = 1) -> int:
    """Bytes of the gradients that are there when a pass is over, at most; ``passes`` as for ``release_gradients``."""
    trained = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not isinstance(optimizer, ShardedOptimizer):
        return sum(p.nbytes for p, _ in trained)
    if keep == NOTHING:
        return 0
    total, whole = 0, 0
    for group in optimizer.param_groups:
        held = [p for p in group["params"] if p.requires_grad]
        reduced = keep == COORDINATES and optimizer.keeps_coordinates and optimizer.is_for_matrices(group)
        sizes = [p.element_size() * (optimizer.reduced_size(p, group) if reduced else p.numel()) for p in held]
        total += sum(sizes)
        if reduced:
            spared = {p: p.nbytes - size for p, size in zip(held, sizes, strict=True)}
            lots = optimizer.kept_together(group, one_pass=passes == 1)
            whole += max([0, *(sum(spared.get(p, 0) for p in lot) for lot in lots)])
    return total + whole


def exchanged_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, keep: str) -> int:
    """Bytes of messages under DistributedDataParallel: its own buckets, and lots that are on their way."""
    assert isinstance(optimizer, ShardedOptimizer)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    sent = [p.nbytes for p in exchanged(model, optimizer, keep).values()]
    on_way = min(sum(sent), WAITING * max([LOT_BYTES, *sent]))
    return trained - sum(sent) + on_way
