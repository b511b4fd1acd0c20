"""Which parameters DistributedDataParallel leaves to ``release_gradients``, and what is refused of it."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..validation import one_of
from .core.optimizer import ShardedOptimizer
from .distributed import UnsupportedLayout

COORDINATES, NOTHING = "coordinates", "nothing"
KEEPS = (COORDINATES, NOTHING)
UNFINISHED = (
    "keep_out_of_ddp has taken parameters out of DistributedDataParallel, and nothing sums their gradients yet; call "
    "release_gradients(ddp, optimizer, keep={keep!r}) before the first step"
)
_guards: WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = WeakKeyDictionary()


def keep_out_of_ddp(model: nn.Module, optimizer: torch.optim.Optimizer, keep: str = COORDINATES) -> None:
    """Have DistributedDataParallel leave alone what ``release_gradients`` frees. Called before it is built.

    It then has no buckets for those parameters, and sends nothing of them.
    With ``coordinates`` these are the matrices with a subspace; what the plain rule moves stays DDP's. With ``nothing``
    all but the smallest parameter, for DDP refuses to have none. Without DDP, on one process, it changes nothing.

    Args:
        model: what DistributedDataParallel will be given.
        optimizer: of this package, for parameters of ``model``.
        keep: as for ``release_gradients``.

    Raises:
        ValueError: for another ``keep``.
        TypeError: for an optimizer of another package.
        UnsupportedLayout: where ``model`` is wrapped already; of coordinates, for a class that needs more.
        RuntimeError: later, from ``optimizer.step()``, where ``release_gradients`` was not called.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from gracile.optim import GaLoreAdamW, keep_out_of_ddp, param_groups, release_gradients
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> optimizer = GaLoreAdamW(param_groups(model, rank=4, target_modules="all-linear"), lr=0.01)
        >>> keep_out_of_ddp(model, optimizer)
        >>> ddp = model  # DistributedDataParallel(model), where there are several processes
        >>> released = release_gradients(ddp, optimizer)
    """
    one_of(*KEEPS)("keep", keep)
    if not isinstance(optimizer, ShardedOptimizer):
        raise TypeError(f"keep_out_of_ddp needs an optimizer of gracile.optim, got {type(optimizer).__name__}")
    reason = needs_all(optimizer)
    if keep == COORDINATES and reason is not None:
        raise UnsupportedLayout(reason)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise UnsupportedLayout("keep_out_of_ddp comes before DistributedDataParallel is built, and it was")
    names, ignored = names_in_ddp(model), {*getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
    for p in exchanged(model, optimizer, keep).values():
        ignored |= {*names[p]}
    wrapper: Any = DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
    end_guard(optimizer)

    def guard(*_: Any) -> None:
        raise RuntimeError(UNFINISHED.format(keep=keep))

    _guards[optimizer] = optimizer.register_step_pre_hook(guard)


def needs_all(optimizer: ShardedOptimizer) -> str | None:
    """Why coordinates are not enough; None where they are."""
    reasons = map(optimizer.why_all_is_needed, optimizer.param_groups)
    return next((f"{reason}; give keep='nothing'" for reason in reasons if reason is not None), None)


def end_guard(optimizer: torch.optim.Optimizer) -> None:
    """``release_gradients`` was called."""
    guard = _guards.pop(optimizer, None)
    if guard is not None:
        guard.remove()


def exchanged(model: nn.Module, optimizer: ShardedOptimizer, keep: str) -> dict[str, Tensor]:
    """By name the parameters whose gradients DDP does not see."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, Tensor] = {name: p for name, p in trained.items() if p in groups}
    if keep == COORDINATES:
        found = {name: p for name, p in found.items() if p.dim() == 2 and optimizer.is_for_matrices(groups[p])}
    if found and len(found) == len(trained):
        del found[min(found, key=lambda name: found[name].numel())]
    return found


def names_in_ddp(model: nn.Module) -> dict[Tensor, list[str]]:
    """The names by which DDP must be told to leave a parameter alone: of a tied one all, and those of the model's own
    parameters also with the dot that its reducer puts before them."""
    names: dict[Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).extend([name] if "." in name else [name, f".{name}"])
    return names


def left_to_exchange(ddp: DistributedDataParallel, optimizer: ShardedOptimizer) -> dict[str, Tensor]:
    """By name the parameters of the optimizer that DDP leaves alone, in the order of registration."""
    of_optimizer = {p for group in optimizer.param_groups for p in group["params"]}
    named = names_in_ddp(ddp.module).items()
    left = {names[0]: p for p, names in named if ddp.parameters_to_ignore.issuperset(names)}
    return {name: p for name, p in left.items() if p.requires_grad and p in of_optimizer}


def refused_of_ddp(ddp: DistributedDataParallel, optimizer: ShardedOptimizer, keep: str) -> str | None:
    """Why gradients cannot be freed under ``ddp``; None where they can."""
    owned = exchanged(ddp.module, optimizer, keep).keys() - left_to_exchange(ddp, optimizer).keys()
    if owned:
        return (
            f"DistributedDataParallel sums the whole gradient of {min(owned)}; call keep_out_of_ddp(model, optimizer, "
            f"keep={keep!r}) before it is built"
        )
    if ddp.mixed_precision is not None:
        return "DistributedDataParallel's mixed_precision has gradients in a dtype of its own; use torch.autocast"
    if dist.get_world_size(ddp.process_group) != dist.get_world_size():
        return "DistributedDataParallel is of some of the processes; coordinates and moves are exchanged among all"
    return None


def check_agreement(ddp: DistributedDataParallel, told: dict[str, Any]) -> None:
    """Refuse processes that were told different things. Collective."""
    of_each: list[Any] = [None] * dist.get_world_size(ddp.process_group)
    dist.all_gather_object(of_each, told, group=ddp.process_group)
    for process, theirs in enumerate(of_each):
        for key, value in told.items():
            if theirs[key] != value:
                raise ValueError(
                    f"release_gradients has {key}={value!r} here and {theirs[key]!r} on process {process}; all "
                    "processes must free the same gradients in one order"
                )
