"""Tensors that say they are on a GPU and compute on the CPU, so that a machine without one can tell what a step of an
optimizer does on one: whether it mixes devices, where it waits for the device, and how many kernels it launches.

    with pretend() as record:
        p = nn.Parameter(on_device(torch.randn(8, 8)))
        ...
        optimizer.step()
    record.launches, record.waits

It raises where tensors of two devices meet, as CUDA does; ``pretend(without_fp64=True)`` also where one of fp64 would
be on the device, or come from it in one call, as Apple's MPS does. What it does not know: the kernels inside a library
call (an SVD counts as one), speed, and whether a GPU's kernel is deterministic. Gradients are given, not computed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from gracile import fp64
from gracile.optim.core import rules_8bit


class _Backend(_DummyBackendModule):
    """What ``torch.autocast`` asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretended", _Backend())
DEVICE = torch.device("pretended:0")
ROOT = Path(__file__).parents[1]
# What asks the device for sizes, or for whether it failed.
WAITING = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc", "equal",
    "_linalg_svd", "_linalg_eigh", "linalg_inv_ex", "_linalg_check_errors",
}  # fmt: skip
# What only makes or names memory.
WITHOUT_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh", "set_",
    "is_pinned", "_unsafe_view", "_reshape_alias", "_local_scalar_dense",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
A_LAUNCH = 30  # about as many tensors as one launch of a foreach kernel takes


@dataclass
class Record:
    """What was asked of the device. Places are ``file:line`` of this package."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)  # from the CPU, which wait for it too

    @property
    def launches(self) -> int:
        return self.kernels.total()

    def clear(self) -> None:
        for counter in (self.kernels, self.waits, self.copies):
            counter.clear()


class OnDevice(Tensor):
    """A tensor of the pretended device; ``held`` is its memory."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        _pretending.check_dtype(held.dtype)
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, **_) -> str:
        return f"OnDevice({self.held})"

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        _pretending.record.waits[_place()] += 1
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _pretending.run(function, args, kwargs or {})


def on_device(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` on the device."""
    return OnDevice(tensor.detach().clone())


class _Pretending(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self.without_fp64 = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        held = [tensor for tensor in given if isinstance(tensor, OnDevice)]
        asked = kwargs.get("device")
        to_device = asked is not None and torch.device(asked).type == DEVICE.type
        if not held and not to_device:
            return function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        self.check_dtype(args[0].dtype if name == "copy_" else kwargs.get("dtype"))
        self._check_devices(name, given, moving=asked is not None or name == "copy_")
        self._note(name, function, args, leaves_device=bool(held) and asked is not None and not to_device)
        own = {id(tensor.held): tensor for tensor in held}
        plain = {**kwargs, **({} if asked is None else {"device": torch.device("cpu")})}
        found = function(*tree_map(_held, args), **tree_map(_held, plain))
        if name == "_local_scalar_dense" or (asked is not None and not to_device):
            return found
        if name == "copy_" and not isinstance(args[0], OnDevice):
            return args[0]
        return tree_map(lambda leaf: own.get(id(leaf), OnDevice(leaf)) if isinstance(leaf, Tensor) else leaf, found)

    def check_dtype(self, dtype: torch.dtype | None) -> None:
        """Of a tensor on the device, or to which it writes."""
        if self.without_fp64 and dtype == torch.float64:
            raise TypeError(f"Cannot convert a tensor to float64, as the device doesn't support float64: {_place()}")

    def _check_devices(self, name: str, given: list[Tensor], moving: bool) -> None:
        """Numbers of the CPU may meet the device, and indices, which are copied."""
        moved = moving or name in INDEXING
        elsewhere = [tensor for tensor in given if not isinstance(tensor, OnDevice) and (tensor.dim() or moving)]
        if elsewhere and not moved:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, got {DEVICE} and cpu: {name}, {_place()}"
            )
        if elsewhere:
            self.record.copies[_place()] += 1

    def _note(self, name: str, function, args, leaves_device: bool) -> None:
        indices = args[1] if name in INDEXING else ()
        by_flags = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
        to_host = name == "copy_" and not isinstance(args[0], OnDevice)
        counting = name == "repeat_interleave" and function._overloadname == "Tensor"
        if name in WAITING or name == "_local_scalar_dense" or by_flags or to_host or leaves_device or counting:
            self.record.waits[_place()] += 1
        if function.is_view or name in WITHOUT_KERNEL:
            return
        grouped = name.startswith(("_foreach", "_fused"))
        self.record.kernels[name] += -(-len(args[0]) // A_LAUNCH) if grouped else 1


_pretending = _Pretending()


def _held(leaf):
    return leaf.held if isinstance(leaf, OnDevice) else leaf


def _place() -> str:
    """The innermost line of this package that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests") and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class _Generator(torch.Generator):
    """One of the device draws on the CPU."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return _made("cpu")


_made = torch.Generator


@contextmanager
def pretend(without_fp64: bool = False) -> Iterator[Record]:
    """In the block there is a device."""
    _pretending.record, _pretending.without_fp64 = Record(), without_fp64
    types = fp64.WITHOUT_FP64 | ({DEVICE.type} if without_fp64 else set())
    with_kernel = patch.object(rules_8bit, "WITH_KERNEL", rules_8bit.WITH_KERNEL | {DEVICE.type})
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        generator, without = patch.object(torch, "Generator", _Generator), patch.object(fp64, "WITHOUT_FP64", types)
        with generator, without, with_kernel, _pretending:
            yield _pretending.record
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
