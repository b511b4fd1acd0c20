"""Alike matrices as one tensor with a dimension before their own, so that one kernel works on all of them.

Tensors that lie one after the other in one piece of memory, as the views ``t[e]`` of a tensor of experts do, are such a
tensor already: nothing is copied, and what is written to it is written. Others are copied, and copied back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..numbers import Number, add_each_, is_zero
from .blocked import WrittenUpdate
from .full import FullMatrix, FullShard, PendingSolve, Update, has_subspace
from .projection import LowRankUpdate, ProjectionSide

State = MutableMapping[str, Tensor]


def stacked(tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Tensors of one shape, dtype and device (each of any shape) as one (B x their shape), and whether it is a view of
    the memory that they have."""
    first = tensors[0]
    if not _lie_in_one(tensors):
        return torch.stack(list(tensors)), False
    size, strides = (len(tensors), *first.shape), (first.numel(), *first.stride())
    return first.as_strided(size, strides, first.storage_offset()), True


def _lie_in_one(tensors: Sequence[Tensor]) -> bool:
    """Whether each begins in memory where the one before it ends."""
    first = tensors[0]
    memory, strides, size = first.untyped_storage()._cdata, first.stride(), first.numel()
    begin, reach = int(first.storage_offset()), sum((n - 1) * s for n, s in zip(first.shape, strides, strict=True))
    if reach >= size or len(tensors) == 1:  # rows with others between them; or no stack
        return False
    return all(
        other.storage_offset() == begin + number * size
        and other.stride() == strides
        and other.untyped_storage()._cdata == memory
        for number, other in enumerate(tensors)
    )


class StackedState(MutableMapping[str, Tensor]):
    """The states of alike matrices as the state of one: what is asked for is stacked (B x its shape, B x 1 x 1 of a
    single number), and ``write_back`` gives it to each matrix, but for ``only_read``. Their clock is one."""

    def __init__(self, states: Sequence[State], only_read: Collection[str] = (), of_vectors: bool = False) -> None:
        self.states, self.only_read, self.of_vectors = states, only_read, of_vectors
        self._held: dict[str, tuple[Tensor, bool]] = {}  # and whether it is a view

    def __getitem__(self, key: str) -> Tensor:
        if key == "step":
            return self.states[0]["step"]
        if key not in self._held:
            self._hold(key, *stacked([state[key] for state in self.states]))
        return self._held[key][0]

    def _hold(self, key: str, together: Tensor, is_view: bool) -> None:
        if together.dim() == 1:
            together = together[:, None, None]
        elif self.of_vectors:
            together = together.unsqueeze(1)
        self._held[key] = together, is_view

    def __setitem__(self, key: str, value: Tensor) -> None:
        self[key].copy_(value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{key} is state of several matrices")

    def __contains__(self, key: object) -> bool:
        return key in self.states[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.states[0])

    def __len__(self) -> int:
        return len(self.states[0])

    def parts(self, keys: Sequence[str]) -> Sequence[State]:
        """The states that a rule is asked with: this one where ``keys`` are stacked already, or lie so, else each."""
        for key in keys:
            held = [state[key] for state in self.states]
            if key not in self._held and _lie_in_one(held):
                self._hold(key, *stacked(held))
        return [self] if all(key in self._held for key in keys) else self.states

    def write_back(self) -> None:
        """Into the matrices' own tensors, what was stacked to be written to."""
        for key, (together, is_view) in self._held.items():
            if not (is_view or key in self.only_read):
                own = [state[key] for state in self.states]
                torch._foreach_copy_(own, [part.view(like.shape) for part, like in zip(together, own, strict=True)])
        self._held.clear()


class StackedMatrix(FullMatrix):
    """Alike matrices, each held entirely, as one of B x m x n. ``side`` and ``shape`` are those of each."""

    def __init__(self, shards: Sequence[FullShard], side: ProjectionSide) -> None:
        first = shards[0]
        super().__init__(first.parameter, first.position, first.workspace, side)
        self.shards, self.shape = shards, first.shape
        self._weights: Tensor | None = None
        self._spare: Tensor | None = None  # a copy of the gradients that follow
        self._gradients: Sequence[Tensor] = []

    @property
    def positions(self) -> list[int]:
        return [shard.position for shard in self.shards]

    @property
    def weights(self) -> list[Tensor]:
        return [shard.parameter for shard in self.shards]

    def in_blocks(self, twice: bool = False) -> bool:
        return False  # as many are a stack as memory is for

    def stack_gradients(self, gradients: Sequence[Tensor]) -> Tensor:
        """B x m x n."""
        G, is_view = stacked(gradients)
        self._spare, self._gradients = (None, []) if is_view else (G, gradients)
        return G

    def refill(self, G: Tensor) -> Tensor:
        """The gradients once more, in the memory of a stack of them that was written to."""
        return torch.stack(list(self._gradients), out=G)

    def spare(self, G: Tensor) -> Tensor | None:
        return G if G is self._spare else None

    # ---- what all elements of a matrix have in common: B x 1 x 1 --------------------------------------------------

    def norm(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(like, dim=(-2, -1), keepdim=True, dtype=dtype)
        return norm

    def count(self, like: Tensor) -> int:
        return like.numel() // len(self.shards)

    def weight_rms(self) -> Tensor:
        norms = torch._foreach_norm(self.weights, dtype=self._wide)
        return torch.stack(list(norms))[:, None, None] / math.sqrt(self.shards[0].parameter.numel())

    # ---- the weights ------------------------------------------------------------------------------------------------

    def gather_weights(self, keep: bool = False) -> Tensor:
        weights, self._weights = self._weights, None
        if weights is None:
            own = self.in_one_piece
            weights = own[0] if own[0].dim() > len(self.shape) else torch.stack(list(own))
        if keep:
            self._weights = weights
        return weights

    def rewrite(self, weights: Tensor) -> None:
        own = self.in_one_piece
        torch._foreach_copy_(own, [weights] if len(own) == 1 else list(weights))

    def write(self, update: Update, step_size: Number, decay: Number, decay_first: bool) -> None:
        decays = not is_zero(decay)
        if decays and decay_first:
            self._scale(1 - decay)
        self.add_(update, -step_size)
        if decays and not decay_first:
            self._scale(1 - decay)

    def _scale(self, factor: Number) -> None:
        """W <- factor * W. Of several, the factors of each (B x 1 x 1)."""
        weights = self.in_one_piece
        if not isinstance(factor, Tensor) or factor.dim() == 0:
            torch._foreach_mul_(weights, factor)
        elif len(weights) == 1:
            weights[0].mul_(factor.view(-1, *[1] * len(self.shape)))
        else:
            torch._foreach_mul_(weights, list(factor.view(-1)))

    def add_(self, update: Update, alpha: Number) -> None:
        assert not isinstance(update, WrittenUpdate), "of a matrix that has a subspace"
        weights = self.in_one_piece
        if isinstance(update, LowRankUpdate):
            dense, alpha = update.product().to(self.parameter.dtype), alpha * update.factor
        else:
            dense = update
        add_each_(weights, [dense] if len(weights) == 1 else list(dense), alpha)

    @cached_property
    def in_one_piece(self) -> list[Tensor]:
        """The weights: one tensor where they lie in one, else each."""
        return [stacked(self.weights)[0]] if _lie_in_one(self.weights) else self.weights

    def state(self, states: Sequence[State], only_read: Collection[str] = ()) -> StackedState:
        return StackedState(states, only_read)

    # ---- the whole matrix -------------------------------------------------------------------------------------------

    def solve(self, block: Tensor, find: Callable[[Tensor], Tensor]) -> PendingSolve:
        return super().solve(block, lambda whole: torch.stack([find(matrix) for matrix in whole]))


class StackedVectors(StackedMatrix):
    """Alike vectors of n elements as B matrices of one row, B x 1 x n, whose moments live in their own elements."""

    ranked = False

    def __init__(self, shards: Sequence[FullShard]) -> None:
        n = shards[0].parameter.numel()
        super().__init__(shards, ProjectionSide((1, n), n, right=True))

    def stack_gradients(self, gradients: Sequence[Tensor]) -> Tensor:
        return super().stack_gradients(gradients).unsqueeze(1)

    def state(self, states: Sequence[State], only_read: Collection[str] = ()) -> StackedState:
        return StackedState(states, only_read, of_vectors=True)

    def add_(self, update: Update, alpha: Number) -> None:
        super().add_(update.squeeze(1) if isinstance(update, Tensor) else update, alpha)


def stack_of(shards: Sequence[FullShard]) -> StackedMatrix:
    """Alike matrices with a subspace, or alike vectors, as one."""
    first = shards[0]
    return StackedMatrix(shards, first.side) if has_subspace(first) else StackedVectors(shards)
