"""Clipping by the norm of all gradients where none is kept: of a first backward pass only norms stay, a second one over
the same batch moves parameters by gradients that are scaled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .core.projected_gradient import local_of
from .distributed import is_dtensor

ADDED_TO_NORM = 1e-6  # torch.nn.utils.clip_grad_norm_'s


class Clipping:
    """Of one step: what its first pass finds, and the factor that gradients of the second are multiplied by."""

    def __init__(self) -> None:
        self.norms: dict[Tensor, Tensor] = {}  # of what this process holds of each gradient
        self.factor: Tensor | None = None

    @property
    def measures(self) -> bool:
        return self.factor is None

    def has_measured(self, p: Tensor) -> bool:
        return self.measures and p in self.norms

    def measure(self, p: Tensor) -> None:
        """The gradient's norm stays, and no more."""
        gradient = local_of(p.grad)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        self.norms[p] = torch.linalg.vector_norm(gradient, dtype=wide)
        p.grad = None

    def scale(self, p: Tensor) -> None:
        assert self.factor is not None
        gradient = local_of(p.grad)
        gradient.mul_(self.factor.to(gradient.device))

    def scale_to(self, norm: Tensor, max_norm: float) -> None:
        """As ``torch.nn.utils.clip_grad_norm_`` does it."""
        self.factor = torch.clamp(max_norm / (norm + ADDED_TO_NORM), max=1.0)

    def total_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm of the norms. Collective where ``parameters``, all that are trained, are split."""
        parts: dict[tuple[object, ...], list[Tensor]] = {}
        for p in parameters:  # in one order on all processes, also those without a gradient of some
            found = parts.setdefault(_split_over(p), [])
            if p in self.norms:
                found.append(self.norms[p])
        device = next((norm.device for found in parts.values() for norm in found), torch.device("cpu"))
        return _norm([_over_processes(groups, _norm(found, device)) for groups, found in parts.items()], device)


def _norm(norms: list[Tensor], device: torch.device) -> Tensor:
    if not norms:
        return torch.zeros((), device=device)
    of_norms: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))
    return of_norms


def _split_over(p: Tensor) -> tuple[object, ...]:
    """The process groups that each hold a part of it."""
    if not is_dtensor(p):
        return ()
    from torch.distributed.tensor import DTensor

    assert isinstance(p, DTensor)
    mesh = p.device_mesh
    return tuple(mesh.get_group(i) for i, placement in enumerate(p.placements) if not placement.is_replicate())


def _over_processes(groups: tuple[object, ...], norm: Tensor) -> Tensor:
    if not groups:
        return norm
    squares = norm.square()
    for group in groups:
        dist.all_reduce(squares, group=group)
    return squares.sqrt()


@contextmanager
def same_random_numbers(parameters: Iterable[Tensor]) -> Iterator[None]:
    """After the block torch's generators are as before it, of the CPU and of where the parameters are."""
    devices: dict[str, set[int]] = {"cuda": set()}  # the CPU's is kept with any
    for p in parameters:
        if p.device.type != "cpu":
            devices.setdefault(p.device.type, set()).add(p.device.index or 0)
    with ExitStack() as stack:
        for kind, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(sorted(indices), device_type=kind))
        yield
