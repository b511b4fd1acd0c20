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
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..validation import one_of, require
from .core.optimizer import ShardedOptimizer
from .core.projected_gradient import ProjectedGradient, local_of
from .core.types import Group
from .distributed import UnsupportedLayout, is_dtensor

COORDINATES, NOTHING = "coordinates", "nothing"
KEEPS = (COORDINATES, NOTHING)
READ = (
    "a gradient was freed in the backward pass, when its parameter had moved, and {what} wants it: clipping by a "
    "global norm, GradScaler and accumulation need all gradients; do without them (max_grad_norm=0, bf16 without a "
    "scaler, one pass a step), or call remove() of what release_gradients returned"
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
aten = torch.ops.aten
VIEWS = (aten.detach.default, aten.view.default, aten.slice.Tensor)  # which read nothing
SCALED = (aten.mul_.Tensor, aten.mul_.Scalar)
SCALED_EACH = (aten._foreach_mul_.Tensor, aten._foreach_mul_.Scalar)


class FreedGradient(Tensor):
    """Looks like the gradient that was there and knows its norm, which is logged; holds no memory. Raises where it is
    read or written to, but for a factor of one, by which clipping to a norm that is not reached multiplies."""

    norm_then: Tensor
    _one: tuple[Tensor, bool] | None = None  # the last factor, and whether it is one: asked of the device once for all

    @staticmethod
    def __new__(cls, like: Tensor, norm: Tensor, shape: Sequence[int] | None = None) -> FreedGradient:
        made: FreedGradient = Tensor._make_wrapper_subclass(
            cls, like.shape if shape is None else shape, dtype=like.dtype, device=like.device
        )
        made.norm_then = norm
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FreedGradient({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        own, rest = args[0], args[1:]
        if func in VIEWS:
            seen = func(torch.empty(own.shape, device="meta"), *rest, **(kwargs or {}))
            return FreedGradient(own, own.norm_then, seen.shape)
        if func is aten.linalg_vector_norm.default and rest in ((), (2,)):
            return own.norm_then
        if func is aten._foreach_norm.Scalar and rest in ((), (2,)):
            return [gradient.norm_then for gradient in own]
        if func in SCALED and cls._is_one(rest[0]):
            return own
        if func in SCALED_EACH and cls._is_one(rest[0]):
            return None
        raise RuntimeError(READ.format(what=f"torch's {func._schema.name.removeprefix('aten::')}"))

    @classmethod
    def _is_one(cls, factor: Any) -> bool:
        if not isinstance(factor, Tensor):
            return bool(factor == 1)
        if cls._one is None or cls._one[0] is not factor:
            cls._one = factor, bool(factor == 1)
        return cls._one[1]


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


def is_freed(grad: Tensor | None) -> bool:
    return isinstance(local_of(grad), FreedGradient)


class ReleasedGradients:
    """The hooks of a model and its optimizer; ``remove`` takes them away."""

    def __init__(self, optimizer: ShardedOptimizer, keep: str, passes: int | None = None) -> None:
        self.passes = passes
        self.optimizer, hook = optimizer, self._move if keep == NOTHING else self._project
        self.handles: list[RemovableHandle] = []
        self.groups: dict[Tensor, Group] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self.groups[p] = group
                    self.handles.append(p.register_post_accumulate_grad_hook(hook))
        self.handles.append(optimizer.register_step_pre_hook(self._check))

    def remove(self) -> None:
        """Gradients stay again, until ``step`` has used them."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._clear()

    @torch.no_grad()
    def _move(self, p: Tensor) -> None:
        if self.optimizer.has_moved_early(p):
            p.grad = None
            raise RuntimeError(TWICE.format(shape=tuple(p.shape)))
        freed = _freed(p)  # before a method may use up the gradient
        self.optimizer.move_early(p)
        p.grad = freed

    @torch.no_grad()
    def _project(self, p: Tensor) -> None:
        if isinstance(local_of(p.grad), ProjectedGradient):  # to which the pass was added
            if self.passes is not None:
                raise RuntimeError(MORE_PASSES)
            return
        assert p.grad is not None
        with torch.autocast(p.device.type, enabled=False):
            reduce = self.optimizer.reduction_of(p, self.groups[p], refresh=self.passes is not None)
            if reduce is not None:
                p.grad = _with_local(p, ProjectedGradient.of(local_of(p.grad), reduce))
            elif is_dtensor(p) and _is_view(local_of(p.grad)):
                p.grad = _with_local(p, local_of(p.grad).clone())  # FSDP2's are views of one tensor for a layer

    def _check(self, *_: Any) -> None:
        """Before the step's end."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self.groups:
                    raise UnsupportedLayout(
                        "a parameter of the optimizer is another one than when release_gradients was called, so that "
                        "its gradient was kept; call it after fully_shard, and after add_param_group"
                    )
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
        model: what ``backward`` goes through; under FSDP2 after ``fully_shard``.
        optimizer: of this package, for parameters of ``model``.
        keep: ``coordinates``: of a matrix with a subspace G P, between its refreshes, of one with a mask the entries of
            it, but where gradients say how it changes; of others all. For classes whose rule needs no more: GaLore's,
            8-bit ones too, on one process and under FSDP2; SET's, RigL's and their like, on one process. Passes add
            up, clipping and ``GradScaler`` work; the norm is exact after one pass, and after several to some percent
            (1, where it was measured).
            ``nothing``: the parameter moves at once, of every class, on one process and under FSDP2. What concerns
            several parameters together (pruning of a group, merges of factors) comes in ``step()``. Both to the bit of
            the ordinary step on a CPU, coordinates to rounding where passes are added or scaled, and experts with exact
            vectors likewise in a step in which some wait for their first token.
        passes: 1, where each step has one backward pass: then new subspaces too are found in it, and of all gradients
            with a subspace one is there at a time. None keeps those that a subspace is due from until all passes have
            added up: of all matrices in the same step, or in turns, where their group has ``refreshes_at_once``, and
            then the first subspaces, which come out of turn, are found from the first pass. With ``nothing`` there is
            one pass anyhow.

    Returns:
        What ``remove()`` ends it by.

    Raises:
        ValueError: for another ``keep``, or ``passes`` that are not 1.
        TypeError: for an optimizer of another package.
        UnsupportedLayout: under DeepSpeed and DistributedDataParallel, which need whole gradients after the pass; in
            several processes with whole parameters; with ``capturable``; of coordinates, for a class that needs more,
            and of masks under FSDP2. Later, from ``step()``, where parameters were replaced since.
        RuntimeError: later, where something reads a gradient that was freed, as with ``nothing`` global clipping,
            GradScaler and a second pass in one step do.

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
    complaints = [_split_by_deepspeed, _summed_later, _captured]
    for complaint in [*complaints, *([_needs_all, _split] if keep == COORDINATES else [])]:
        reason = complaint(model, optimizer)
        if reason is not None:
            raise UnsupportedLayout(reason)
    return ReleasedGradients(optimizer, keep, passes)


def _parameters(optimizer: ShardedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _split_by_deepspeed(model: nn.Module, optimizer: ShardedOptimizer) -> str | None:
    of_engine = type(model).__module__.partition(".")[0] == "deepspeed"
    if of_engine or any(hasattr(p, "ds_id") for p in [*model.parameters(), *_parameters(optimizer)]):
        return "DeepSpeed owns the gradients of its parameters and needs them after the pass; use FSDP2, or one process"
    return None


def _summed_later(model: nn.Module, optimizer: ShardedOptimizer) -> str | None:
    if isinstance(model, DistributedDataParallel):
        return "DistributedDataParallel sums whole gradients after hooks have seen them; use FSDP2"
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and not all(map(is_dtensor, _parameters(optimizer))):
        return (
            "several processes hold whole parameters, whose gradients are summed after hooks have seen them; use "
            "FSDP2, and call release_gradients after fully_shard"
        )
    return None


def _captured(model: nn.Module, optimizer: ShardedOptimizer) -> str | None:
    if any(group["capturable"] for group in optimizer.param_groups):
        return "capturable=True is for a step in a CUDA graph, of which nothing moves in a backward pass; leave it out"
    return None


def _needs_all(model: nn.Module, optimizer: ShardedOptimizer) -> str | None:
    reasons = map(optimizer.why_all_is_needed, optimizer.param_groups)
    return next((f"{reason}; give keep='nothing'" for reason in reasons if reason is not None), None)


def _split(model: nn.Module, optimizer: ShardedOptimizer) -> str | None:
    if any(map(is_dtensor, _parameters(optimizer))) and not optimizer.keeps_coordinates_split:
        return "entries of masks are kept of whole gradients, which FSDP2 has split; give keep='nothing'"
    return None


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
