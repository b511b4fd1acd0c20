"""The memory of a forward and backward pass, found by running it on fake tensors, which have none."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from ... import int8_weight
from ...int8_weight import memory_of, row_spans
from ..build.trainee import blank_batch


@dataclass(frozen=True)
class AtPeak:
    """Bytes alive at the peak of a pass, without what was allocated before it."""

    activations: int = 0
    gradients: int = 0
    temporary: int = 0
    step: int = 0  # of an optimizer that works in the pass, as it was measured

    @property
    def bytes(self) -> int:
        return self.activations + self.gradients + self.temporary + self.step


@dataclass(frozen=True)
class Pass:
    """Bytes that a forward and backward pass allocates: weights, earlier gradients and optimizer state do not count."""

    activations: int  # alive when the forward pass has ended
    at_peak: AtPeak
    gradients: int = field(default=0, compare=False)  # with what they are views of


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operations allocate in the block, while they live; not those of ``known`` tensors."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        held = chain.from_iterable(map(memory_of, known))
        self._known = [t.untyped_storage() for t in held]  # kept alive: a storage is recognised by its address
        self._sizes = {storage._cdata: 0 for storage in self._known}
        self._made: dict[int, int] = {}  # by storage, its number in order of allocation
        self._made_so_far = self._made_at_peak = 0
        self._gradients: set[int] = set()
        self._activations: set[int] = set()
        self._alive = {"activations": 0, "gradients": 0, "temporary": 0}
        self.at_peak = AtPeak()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default:
            made = _grouped_product(*args[:3])
        elif args and isinstance(args[0], FakeTensor):
            made = _of_fakes(function, args, kwargs or {})
        else:
            made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                for held in memory_of(leaf):
                    self._see(held.untyped_storage())
        return made

    def forward_has_ended(self) -> int:
        """Count what is alive now as activations; returns their bytes."""
        self._activations = {key for key, size in self._sizes.items() if size}
        activations, self._alive["temporary"] = self._alive["temporary"], 0
        self._alive["activations"] = activations
        most = self.at_peak.bytes
        self.at_peak = AtPeak(min(activations, most), 0, max(0, most - activations))
        return activations

    def is_gradient(self, tensor: Tensor) -> None:
        """Count ``tensor``, so far temporary, as a gradient, from its allocation on."""
        key = tensor.untyped_storage()._cdata
        size, kind = self._sizes.get(key, 0), self._kind(key)
        if kind == "gradients" or not size:
            return
        self._alive[kind] -= size
        self._alive["gradients"] += size
        self._gradients.add(key)
        if self._made[key] <= self._made_at_peak and kind == "temporary":
            most = self.at_peak
            self.at_peak = AtPeak(most.activations, most.gradients + size, most.temporary - size)

    def _kind(self, key: int) -> str:
        return "gradients" if key in self._gradients else "activations" if key in self._activations else "temporary"

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes or not size:
            return
        self._sizes[key] = size
        self._made[key] = self._made_so_far = self._made_so_far + 1
        weakref.finalize(storage, self._gone, key)
        self._alive["temporary"] += size
        if sum(self._alive.values()) > self.at_peak.bytes:
            self.at_peak, self._made_at_peak = AtPeak(**self._alive), self._made_so_far

    def _gone(self, key: int) -> None:
        self._alive[self._kind(key)] -= self._sizes.pop(key)
        del self._made[key]
        self._gradients.discard(key)
        self._activations.discard(key)


def _grouped_product(a: Tensor, b: Tensor, ends: Tensor | None = None) -> Tensor:
    """What the products of experts give, by shape: torch's own answer on fake tensors is for bf16 alone, though a CPU
    multiplies in fp32 too. Rows, columns or summands of one group after the other, as far as ``ends``."""
    groups = [ends.shape[0]] if ends is not None and a.dim() == b.dim() == 2 else []
    if a.dim() == b.dim() == 3:
        groups = [a.shape[0]]
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def _of_fakes(function: Any, args: Any, kwargs: Any) -> Any:
    """What depends on values is answered as when all of them are there: every entry of a mask, every token a label."""
    if function is torch.ops.aten._local_scalar_dense.default:
        return 1.0 if args[0].is_floating_point() else 1
    if function is torch.ops.aten.nonzero.default:
        return _places(args[0]).T.contiguous()
    if function in (
        torch.ops.aten.index.Tensor,
        torch.ops.aten._index_put_impl_.default,
        torch.ops.aten.index_put.default,
    ):
        args = (args[0], _without_masks(args[1]), *args[2:])
    return function(*args, **kwargs)


def _places(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.dim(), mask.numel(), dtype=torch.int64)


def _without_masks(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for index in indices:
        found += list(_places(index)) if index is not None and index.dtype == torch.bool else [index]
    return found


class FakePass:
    """Training passes of a model on fake tensors.

    Args:
        make_model: builds it, in training mode; called under fake tensors.
        make_batch: what it is given, by the number of examples and the tokens of each.
        autocast: the dtype of mixed precision, None without.
        accumulated: whether gradients of an earlier pass are there already.
        freed: whether each gradient goes as soon as it is there.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_batch: Callable[[int, int], Mapping[str, Tensor]] = blank_batch,
        *,
        autocast: torch.dtype | None = None,
        accumulated: bool = False,
        freed: bool = False,
    ) -> None:
        self._mode, self._make_batch, self._autocast = FakeTensorMode(), make_batch, autocast
        self._freed = freed
        with self._mode:
            self._model = make_model()
        if accumulated:
            self._pass((1, 1))

    def of(self, batch: tuple[int, int]) -> Pass:
        """One pass over ``batch``: examples, and tokens of each."""
        before = [p.grad for p in self._model.parameters()]
        done = self._pass(batch)
        for p, gradient in zip(self._model.parameters(), before, strict=True):
            p.grad = gradient
        return done

    def _pass(self, batch: tuple[int, int]) -> Pass:
        parameters = list(self._model.parameters())
        hooks = []
        with self._mode:
            given = self._make_batch(*batch)
            before = [p.grad for p in parameters if p.grad is not None]
            ledger = Ledger([*parameters, *self._model.buffers(), *before, *given.values()])
            largest = 0

            def made(p: Tensor) -> None:
                nonlocal largest
                assert p.grad is not None
                ledger.is_gradient(p.grad)
                largest = max(largest, p.grad.nbytes)
                if self._freed:
                    p.grad = None

            for p in parameters:
                if p.requires_grad:
                    hooks.append(p.register_post_accumulate_grad_hook(made))
            with ledger, few_rows(), nullcontext() if "position_ids" in given else _one_document():
                with torch.autocast("cpu", self._autocast) if self._autocast is not None else nullcontext():
                    loss = self._model(**given).loss
                activations = ledger.forward_has_ended()
                loss.backward()
        for hook in hooks:
            hook.remove()
        storages = [p.grad.untyped_storage() for p in parameters if p.grad is not None]
        gradients = sum({storage._cdata: storage.nbytes() for storage in storages}.values()) or largest
        return Pass(activations, ledger.at_peak, gradients)


def few_rows() -> AbstractContextManager[Any]:
    """In the block, of a weight in 8 bits as many rows are worked on as are there together."""
    return patch.object(int8_weight, "row_spans", lambda matrix: islice(row_spans(matrix), 2))


@contextmanager
def _one_document() -> Iterator[None]:
    """In the block, transformers takes each row for one document. It would read that from position ids; of fake tensors
    it cannot, and builds a mask."""
    if not hasattr(masking_utils, "find_packed_sequence_indices"):
        yield
        return
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield
