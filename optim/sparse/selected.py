"""Which weights of a parameter are trained, said beforehand: rows, columns, any entries, or those that are small.

A selection tells the places of its weights in any part of the flattened parameter by itself, so that nothing is sent
where engines split it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...validation import is_real, is_whole, require
from ..distributed import all_reduce_shares_, full_shape, held_shard, spans
from .top_k import keys_at_once, keys_of

Shape = tuple[int, ...]


class Selection:
    """Some weights of one parameter."""

    def check_shape(self, shape: Shape) -> None:
        """Refuse a parameter that it does not fit."""

    def count(self, parameter: Tensor) -> int:
        """How many weights of the whole parameter there are. Collective, where they decide and are split."""
        raise NotImplementedError

    def places(self, begin: int, weights: Tensor, shape: Shape) -> Tensor:
        """The ascending places (int32) in ``weights`` (flat), the part that begins at element ``begin`` of a parameter
        of ``shape``."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Lines(Selection):
    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = tuple(self.numbers)
        good = all(is_whole(number) and number >= 0 for number in numbers) and len({*numbers}) == len(numbers)
        require(good and bool(numbers), f"{self._what} must be whole numbers >= 0, each once and one at least", numbers)
        object.__setattr__(self, "numbers", tuple(sorted(numbers)))

    @property
    def _what(self) -> str:
        return type(self).__name__.lower()

    def _check(self, shape: Shape, axis: int) -> None:
        require(len(shape) == 2, f"{self._what} are those of a matrix", shape)
        require(self.numbers[-1] < shape[axis], f"{self._what} must be below {shape[axis]}", self.numbers[-1])


class Rows(_Lines):
    """Rows of a matrix, outputs of ``nn.Linear``.

    Args:
        numbers: of the rows.

    Raises:
        ValueError: for numbers that are not whole, below 0, there twice, or none.

    Example:
        >>> import torch
        >>> from gracile.optim import SparseAdamW
        >>> from gracile.selections import Rows
        >>> w = torch.nn.Parameter(torch.randn(8, 4))
        >>> optimizer = SparseAdamW([w], selected=Rows((0, 3)), outside="frozen", drop_fraction=0.0)
        >>> optimizer.param_groups[0]["density"]
        0.25
    """

    def check_shape(self, shape: Shape) -> None:
        self._check(shape, 0)

    def count(self, parameter: Tensor) -> int:
        return len(self.numbers) * full_shape(parameter)[1]

    def places(self, begin: int, weights: Tensor, shape: Shape) -> Tensor:
        n, end = shape[1], begin + len(weights)
        rows = torch.tensor([row for row in self.numbers if row * n < end and (row + 1) * n > begin], dtype=torch.int64)
        return _within(rows * n, torch.arange(n), begin, weights)


class Columns(_Lines):
    """Columns of a matrix, inputs of ``nn.Linear``.

    Args:
        numbers: of the columns.

    Raises:
        ValueError: for numbers that are not whole, below 0, there twice, or none.

    Example:
        >>> import torch
        >>> from gracile.optim import SparseAdamW
        >>> from gracile.selections import Columns
        >>> w = torch.nn.Parameter(torch.randn(8, 4))
        >>> optimizer = SparseAdamW([w], selected=Columns((0, 3)), outside="frozen", drop_fraction=0.0)
        >>> optimizer.param_groups[0]["density"]
        0.5
    """

    def check_shape(self, shape: Shape) -> None:
        self._check(shape, 1)

    def count(self, parameter: Tensor) -> int:
        return len(self.numbers) * full_shape(parameter)[0]

    def places(self, begin: int, weights: Tensor, shape: Shape) -> Tensor:
        n = shape[1]
        rows = torch.arange(begin // n, -(-(begin + len(weights)) // n))
        return _within(rows * n, torch.tensor(self.numbers), begin, weights)


def _within(starts: Tensor, offsets: Tensor, begin: int, weights: Tensor) -> Tensor:
    """Of the places ``starts`` + ``offsets`` in the whole parameter those in a part, counted from its first."""
    places = (starts[:, None] + offsets).view(-1) - begin
    return places[(places >= 0) & (places < len(weights))].int().to(weights.device)


@dataclass(frozen=True, eq=False)
class Entries(Selection):
    """Any entries.

    Args:
        mask: of the parameter's shape (bool), True where a weight is trained.

    Raises:
        ValueError: for what is no bool tensor, or True nowhere.

    Example:
        >>> import torch
        >>> from gracile.selections import Entries
        >>> Entries(torch.eye(3).bool()).count(torch.ones(3, 3))
        3
    """

    mask: Tensor

    def __post_init__(self) -> None:
        require(
            isinstance(self.mask, Tensor) and self.mask.dtype == torch.bool, "mask must be a bool tensor", self.mask
        )
        require(bool(self.mask.any()), "mask must be True somewhere; leave the parameter out", tuple(self.mask.shape))

    def check_shape(self, shape: Shape) -> None:
        require(tuple(self.mask.shape) == shape, f"mask must be of the parameter's shape {shape}", (*self.mask.shape,))

    def count(self, parameter: Tensor) -> int:
        return int(self.mask.count_nonzero())

    def places(self, begin: int, weights: Tensor, shape: Shape) -> Tensor:
        own = self.mask.reshape(-1)[begin : begin + len(weights)]
        return own.nonzero().view(-1).int().to(weights.device)


@dataclass(frozen=True)
class Below(Selection):
    """The weights of a smaller size than ``threshold``, as they are when the first step begins.

    Args:
        threshold: what |w| is below, compared in fp32, or wider where the weights are.
        share: of the weights that there will be, for a plan of a model without memory.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> import torch
        >>> from gracile.selections import Below
        >>> Below(0.5).count(torch.tensor([0.1, -0.2, 3.0]))
        2
    """

    threshold: float
    share: float | None = None

    def __post_init__(self) -> None:
        require(is_real(self.threshold) and self.threshold > 0, "threshold must be a number > 0", self.threshold)
        share = self.share
        require(share is None or (is_real(share) and 0 <= share <= 1), "share must be a number in [0, 1]", share)

    def count(self, parameter: Tensor) -> int:
        if parameter.is_meta:
            require(self.share is not None, "a plan cannot look at weights; give the share that threshold has", self)
            return round((self.share or 0.0) * math.prod(full_shape(parameter)))
        shard = held_shard(parameter)
        weights = shard.parameter.reshape(-1)
        own = [self._are(weights[part]).count_nonzero().view(1) for part in _parts(weights)]
        found = torch.cat(own).sum().view(1) if own else torch.zeros(1, dtype=torch.int64, device=weights.device)
        all_reduce_shares_([(shard, found)])
        return int(found)

    def places(self, begin: int, weights: Tensor, shape: Shape) -> Tensor:
        own = [self._are(weights[part]).nonzero().view(-1) + part.start for part in _parts(weights)]
        return torch.cat(own).int() if own else torch.empty(0, dtype=torch.int32, device=weights.device)

    def _are(self, weights: Tensor) -> Tensor:
        wide = torch.promote_types(weights.dtype, torch.float32)
        return keys_of(weights) < keys_of(torch.tensor(self.threshold, dtype=wide)).item()


def _parts(weights: Tensor) -> Sequence[slice]:
    return list(spans(len(weights), keys_at_once(weights.device)))
