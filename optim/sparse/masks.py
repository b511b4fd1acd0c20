"""Masks: which weights of a matrix there are, and how a mask is drawn and changed.

A mask is a subspace of coordinates. It is held as ``indices``, the ascending places of its weights in this process's
part of the matrix, flattened (int32). What can be kept or left together is a structure's unit: one weight, a weight of
a row that has as many as any other row, or a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.clock import steps_of
from ..distributed import FullShard, all_reduce_shares_
from .experts import EXPERTS, are_transposed, as_matrix, experts_of, turned
from .top_k import LARGEST, Choice, keys_at_once, keys_of, largest_of_each, random_keys, salt_of

Keys = Callable[[int, int], Tensor]  # of weights from one place to another

DROPS = ("magnitude", "gradient_magnitude", "random")
GROWS = ("gradient", "momentum", "random")


@dataclass(frozen=True)
class Masked:
    """What this process holds of one matrix (m x n, rows are outputs) with a mask; of ``expert``, if a parameter has
    several, with state of this one alone."""

    shard: FullShard
    group: dict[str, Any]
    state: MutableMapping[str, Tensor]
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return as_matrix(self.shard.shape)

    @property
    def name(self) -> tuple[object, ...]:
        """Which of an optimizer's matrices it is: the same on every process."""
        return (self.shard.position,) if self.expert is None else (self.shard.position, "expert", self.expert)

    @property
    def weights(self) -> Tensor:
        """Flat: a view, but of an expert that is stored transposed."""
        W = self.shard.parameter
        return W.view(-1) if self.expert is None else W.reshape(-1)

    @property
    def device(self) -> torch.device:
        return self.shard.parameter.device

    @property
    def gradient(self) -> Tensor:
        """As autograd left it: what it is worth is its size, whichever way the weights go."""
        assert self.shard.held_gradient is not None
        return self.shard.held_gradient.reshape(-1)

    @property
    def indices(self) -> Tensor:
        return self.state["indices"]

    @property
    def size(self) -> int:
        """How many of the matrix's weights, in a mask or not, this process holds."""
        return self.shard.parameter.numel()

    @property
    def begin(self) -> int:
        """The place of this process's first weight in the whole matrix, flattened."""
        return self.shard.runs.begin

    @property
    def key_dtype(self) -> torch.dtype:
        return torch.int64 if self.shard.parameter.dtype == torch.float64 else torch.int32

    def salt(self, *purpose: object) -> tuple[int, int]:
        """The salt and the factor of ``random``."""
        return salt_of(self.group["seed"], *self.name, *purpose)

    def random(self, units: Tensor, *purpose: object) -> Tensor:
        """Random keys of units of the whole matrix."""
        return random_keys(units, self.group["seed"], *self.name, *purpose).to(self.key_dtype)

    def drop_scores(self, at: Tensor) -> Tensor | None:
        """What the weights of the mask at ``at`` are worth keeping for; None where chance decides."""
        if self.group["drop"] == "random":
            return None
        worth = self.weights.index_select(0, at).abs_()
        worth = worth.to(torch.promote_types(worth.dtype, torch.float32))  # in bf16 a small share of a gradient is lost
        if self.group["drop"] == "gradient_magnitude":
            worth.add_(self.gradient.index_select(0, at).abs_(), alpha=self.group["drop_lambda"])
        return worth

    def grow_scores(self, begin: int, end: int) -> Tensor | None:
        """What any of this process's weights are worth having for; None where chance decides."""
        if self.group["grow"] == "random":
            return None
        return (self.state["momentum"] if self.group["grow"] == "momentum" else self.gradient)[begin:end]

    def drop_keys(self, at: Tensor) -> Tensor:
        worth = self.drop_scores(at)
        return self.random(at.long() + self.begin, "drop", self.clock) if worth is None else self._keys_of(worth)

    def grow_keys(self, begin: int, end: int) -> Tensor:
        worth = self.grow_scores(begin, end)
        return self._random_between(begin, end, "grow", self.clock) if worth is None else self._keys_of(worth)

    def _keys_of(self, worth: Tensor) -> Tensor:
        """Of the dtype that all keys of a matrix have; momentum may be wider or narrower than weights."""
        return keys_of(worth.double() if self.key_dtype == torch.int64 else worth.float())

    def first_keys(self, begin: int, end: int, is_sparse: bool) -> Tensor:
        """For a first mask: a matrix that is sparse already keeps what it has."""
        held = self.weights[begin:end]
        if self.group["init"] == "magnitude":
            return keys_of(held)
        if self.group["init"] == "smallest":
            return LARGEST[self.key_dtype] - keys_of(held)
        drawn = self._random_between(begin, end, "first")
        most = LARGEST[self.key_dtype]
        return torch.where(held != 0, most, drawn.clamp_(max=most - 1)) if is_sparse else drawn

    def _random_between(self, begin: int, end: int, *purpose: object) -> Tensor:
        units = torch.arange(self.begin + begin, self.begin + end, device=self.device)
        return self.random(units, *purpose)

    @property
    def clock(self) -> int:
        return steps_of(self.state)


class MatricesOf:
    """The matrices of several parameters that this process takes part in choosing masks for, and back to parameters."""

    def __init__(self, parameters: Sequence[Masked]) -> None:
        self.parameters = parameters
        self.experts = [list(experts_of(own.shard, are_transposed(own.group))) for own in parameters]
        places = self._bounds()
        self.matrices: list[Masked] = []
        for parameter, experts, bounds in zip(parameters, self.experts, places, strict=True):
            if not _has_experts(parameter):
                self.matrices.append(parameter)
                continue
            held = [parameter.indices[first:last] for first, last in bounds] if "indices" in parameter.state else []
            moved = iter(torch._foreach_add(held, [-expert.begin for expert in experts]) if held else [])
            turn, (m, n) = are_transposed(parameter.group), as_matrix(parameter.shard.shape)
            for expert in experts:
                state = {"step": parameter.state["step"]}
                if held:
                    state["indices"] = turned(next(moved), n, m) if turn else next(moved)
                if "momentum" in parameter.state:
                    own = parameter.state["momentum"][expert.begin : expert.end]
                    state["momentum"] = own.view(m, n).t().reshape(-1) if turn else own
                self.matrices.append(Masked(expert.shard, parameter.group, state, expert.number))

    def joined(self, places: Sequence[Tensor]) -> list[Tensor]:
        """Of places in each matrix (ascending, int32), those in each parameter."""
        own = iter(places)
        found = []
        for parameter, experts in zip(self.parameters, self.experts, strict=True):
            if _has_experts(parameter):
                of_each = [next(own) for _ in experts]
                if are_transposed(parameter.group):
                    m, n = as_matrix(parameter.shard.shape)
                    of_each = [turned(places, m, n) for places in of_each]
                moved = torch._foreach_add(of_each, [expert.begin for expert in experts]) if of_each else []
                found.append(torch.cat(list(moved)) if moved else _no_places(parameter))
            else:
                found.append(next(own))
        return found

    def _bounds(self) -> list[list[tuple[int, int]]]:
        """Where among the places of its parameter each expert's are. The device is told, and asked, once."""
        asked = [
            (parameter.indices, [edge for e in experts for edge in (e.begin, e.end)])
            for parameter, experts in zip(self.parameters, self.experts, strict=True)
            if _has_experts(parameter) and "indices" in parameter.state
        ]
        if not asked:
            return [[] for _ in self.parameters]
        edges = torch.tensor([edge for _, own in asked for edge in own], dtype=torch.int32).to(asked[0][0].device)
        each = torch.split(edges, [len(own) for _, own in asked])
        pairs = zip(asked, each, strict=True)
        found = iter(torch.cat([torch.searchsorted(indices, own) for (indices, _), own in pairs]).tolist())
        return [
            [(next(found), next(found)) for _ in experts] if _has_experts(parameter) else []
            for parameter, experts in zip(self.parameters, self.experts, strict=True)
        ]


def _has_experts(parameter: Masked) -> bool:
    return len(parameter.shard.shape) == EXPERTS


def _no_places(parameter: Masked) -> Tensor:
    return torch.empty(0, dtype=torch.int32, device=parameter.device)


class Change(NamedTuple):
    """A mask after an update: its ``indices`` (ascending), and those of its weights that were kept (ascending)."""

    kept: Tensor
    indices: Tensor


class Structure:
    """How weights are chosen, for several matrices together. Every method but ``check`` and ``units`` is collective."""

    def check(self, group: dict[str, Any]) -> None:
        """Refuse bad values of a group's keys."""

    def check_shape(self, shape: tuple[int, int], group: dict[str, Any]) -> None:
        """Refuse a matrix that does not fit."""

    def units(self, shape: tuple[int, int], group: dict[str, Any]) -> int:
        """How many units an m x n matrix has."""
        return shape[0] * shape[1]

    def weights(self, units: int, group: dict[str, Any]) -> int:
        """How many weights a mask of ``units`` units has."""
        return units

    def check_budget(self, units: int, shape: tuple[int, int]) -> None:
        """Refuse a matrix that would keep too few units."""

    def amounts(self, held: int, budget: int, fraction: float) -> tuple[int, int]:
        """How many of ``held`` units are kept, and how many grow, for ``budget`` in the end."""
        stay = min(held, budget)
        dropped = math.floor(fraction * stay)
        return stay - dropped, budget - stay + dropped

    def begin(self, matrices: Sequence[Masked], budgets: Sequence[int], held: Sequence[int]) -> list[Tensor]:
        """First masks, of ``budgets`` units, of matrices that have ``held`` weights which are not zero."""
        raise NotImplementedError

    def change(
        self, matrices: Sequence[Masked], budgets: Sequence[int], keep: Sequence[int], grow: Sequence[int]
    ) -> list[Change]:
        """Keep so many units of each mask, and let so many grow among all others."""
        raise NotImplementedError


def weights_held(matrices: Sequence[Masked]) -> list[int]:
    """How many weights each mask has. Collective."""
    split = [matrix for matrix in matrices if matrix.shard.split]
    counted = [torch.tensor([len(m.indices)], dtype=torch.int64, device=m.device) for m in split]
    all_reduce_shares_([(matrix.shard, count) for matrix, count in zip(split, counted, strict=True)])
    together = iter(torch.cat(counted).tolist() if counted else [])  # of whole ones the device is not asked
    return [int(next(together)) if matrix.shard.split else len(matrix.indices) for matrix in matrices]


def nonzeros(matrices: Sequence[Masked]) -> list[int]:
    """How many weights of each are not zero. Collective."""
    counted = [matrix.weights.count_nonzero().view(1) for matrix in matrices]
    all_reduce_shares_([(matrix.shard, count) for matrix, count in zip(matrices, counted, strict=True)])
    return [int(count) for count in torch.cat(counted).tolist()] if counted else []


class Unstructured(Structure):
    """Single weights, wherever they are."""

    def begin(self, matrices: Sequence[Masked], budgets: Sequence[int], held: Sequence[int]) -> list[Tensor]:
        """Where a matrix has just as many weights as it should, it is they: nothing is drawn twice."""
        items = list(zip(matrices, budgets, held, strict=True))
        drawn = [(matrix, budget, own) for matrix, budget, own in items if own != budget]
        choices = [all_of(matrix, first_keys_of(matrix, own <= budget)) for matrix, budget, own in drawn]
        chosen = iter(largest_of_each(choices, [budget for _, budget, _ in drawn]))
        held_as_they_are = [m.weights.nonzero().view(-1) if own == budget else None for m, budget, own in items]
        return [(next(chosen) if places is None else places).int() for places in held_as_they_are]

    def change(
        self, matrices: Sequence[Masked], budgets: Sequence[int], keep: Sequence[int], grow: Sequence[int]
    ) -> list[Change]:
        kept = kept_of(matrices, keep)
        choices = [all_of(m, without(m.grow_keys, own, m.size)) for m, own in zip(matrices, kept, strict=True)]
        grown = largest_of_each(choices, grow)
        return [Change(own, torch.cat([own, new.int()]).sort().values) for own, new in zip(kept, grown, strict=True)]


# ---- weights as choices ----------------------------------------------------------------------------------------------


def all_of(matrix: Masked, keys: Keys) -> Choice:
    return Choice(matrix.shard, matrix.size, keys)


def kept_of(matrices: Sequence[Masked], counts: Sequence[int]) -> list[Tensor]:
    """The ``counts`` weights of each mask (ascending places, int32) that are worth most."""
    return chosen_of_masks(matrices, [_keys_of_mask(matrix) for matrix in matrices], counts)


def chosen_of_masks(matrices: Sequence[Masked], keys: Sequence[Keys], counts: Sequence[int]) -> list[Tensor]:
    """The ``counts`` weights of each mask with the largest of ``keys``, which count within the mask."""
    items = zip(matrices, keys, strict=True)
    chosen = largest_of_each([Choice(matrix.shard, len(matrix.indices), own) for matrix, own in items], counts)
    return [matrix.indices[places] for matrix, places in zip(matrices, chosen, strict=True)]


def _keys_of_mask(matrix: Masked) -> Keys:
    return lambda begin, end: matrix.drop_keys(matrix.indices[begin:end])


def first_keys_of(matrix: Masked, is_sparse: bool) -> Keys:
    return lambda begin, end: matrix.first_keys(begin, end, is_sparse)


def without(keys: Keys, kept: Tensor, size: int) -> Keys:
    """``keys`` of ``size`` weights, but those at the ascending places ``kept`` are out."""
    at_once = keys_at_once(kept.device)
    bounds = [0, len(kept)]
    if size > at_once:
        edges = torch.arange(0, size + at_once, at_once, dtype=kept.dtype, device=kept.device)
        bounds = torch.searchsorted(kept, edges).tolist()  # one stop of the device, not one for each part

    def others(begin: int, end: int) -> Tensor:
        found = keys(begin, end)
        if end > begin:
            number = begin // at_once
            found.index_fill_(0, kept[bounds[number] : bounds[number + 1]].long() - begin, -1)
        return found

    return others
