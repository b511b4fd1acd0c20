"""DSEE: an update of low rank plus a few entries, and then a base with zeros.  Chen et al. 2023, arXiv:2111.00160.

    W m x n frozen;  A r x n drawn with a standard deviation of 0.02,  B m x r zero,  d N numbers, zero;  all trained
    Omega   N places of W, the largest of what no matrix of low rank holds of it
    y = W x + s (B A + d_Omega) x                          s = alpha / r
    prune_base:  M = 0 at the share p of the smallest |W + s (B A + d_Omega)|, over all adapted matrices
    y = (M * W) x + s (B A + d_Omega) x                    training goes on

Omega comes from W - svd_r(W) (``support="residual"``) or from the authors' greedy bilateral decomposition
(``"grebsmo"``), of which only the places are used. The score of ``prune_base`` may also leave parts out.

Departures from the published code: N entries are stored as N numbers and places, not as an m x n matrix under a mask;
the scale is on both parts of the score; the modes that rank by reciprocals are left out. Merging makes zeros of W dense
where the update is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...optim.distributed import FullShard, Workspace
from ...optim.sparse.top_k import Choice, keys_of, largest_of_all
from ...validation import Check, number, one_of, whole
from ..config import AdapterConfig
from ..factors import svd_factors
from ..layer import AdapterLayer, Tensors
from ..names import AdapterType
from ..penalty import adapter_layers
from ..registry import register
from ..straight_through import packed_bits, unpacked_bits

OUTER, INNER, ROWS, SMALL = 100, 2, 5, 0.01  # of the authors' decomposition
SCORES = ("W", "WAB", "WABS", "AB", "ABS")


@dataclass
class DSEEConfig(AdapterConfig):
    """DSEE (arXiv:2111.00160): r (m + n) + N trained numbers a matrix, and after ``prune_base`` a mask of m n bits.

    Attributes:
        entries: N, the single weights of a matrix that are moved.
        support: how they are chosen: ``residual`` or ``grebsmo``.
        sparsity: of the base, which ``prune_base`` sets.

    Example:
        >>> from gracile.adapters import DSEEConfig
        >>> DSEEConfig(target_modules=["q_proj"]).entries
        64
    """

    checks: ClassVar[Mapping[str, Check]] = {
        "entries": whole(1),
        "support": one_of("residual", "grebsmo"),
        "sparsity": number("in [0, 1)"),
    }

    r: int = field(default=16, metadata={"help": "Rank of the change of each matrix."})
    alpha: float | None = field(default=32.0, metadata={"help": "The change is scaled by alpha / r."})
    entries: int = field(default=64, metadata={"help": "Single weights of a matrix that are moved."})
    support: str = field(default="residual", metadata={"help": "How they are chosen: residual or grebsmo."})
    sparsity: float = field(default=0.0, metadata={"help": "Of the base; set by prune_base."})


@register(AdapterType.DSEE, DSEEConfig)
class DSEELayer(AdapterLayer):
    """A linear layer with DSEE beside it."""

    prefix, trained, frozen, kept = "dsee_", ("A", "B", "d"), ("places",), ("M",)
    dtypes = MappingProxyType({"places": torch.int64, "M": torch.uint8})

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        m, n = weight.shape
        if config.entries > m * n:
            raise ValueError(f"entries must be at most {m * n}, the weights of {self.name}, got {config.entries}")
        generator = self.generator(config)
        A = torch.randn(r, n, generator=generator) * 0.02
        residual = config.support == "residual"
        left = weight - _low_rank(weight, r, config.seed) if residual else sparse_part(weight, generator)
        places = left.abs().flatten().topk(config.entries).indices.sort().values
        M = packed_bits(torch.ones(m, n, dtype=torch.bool))
        return {"A": A, "B": torch.zeros(m, r), "d": torch.zeros(config.entries), "places": places, "M": M}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        m, n, entries = self.out_features, self.in_features, (config.entries,)
        return {"A": (r, n), "B": (m, r), "d": entries, "places": entries, "M": (-(-m * n // 8),)}

    def update_of(self, adapter: str) -> tuple[Tensor, Tensor]:
        """s B A and s d_Omega (m x n both)."""
        tensors, scale = self.tensors(adapter), self.scale(adapter)
        entries = torch.zeros(
            self.out_features * self.in_features, device=tensors["d"].device, dtype=tensors["d"].dtype
        )
        entries = entries.index_add(0, tensors["places"].long(), tensors["d"])
        return scale * tensors["B"] @ tensors["A"], scale * entries.view(self.out_features, self.in_features)

    def delta(self, weight: Tensor, config: Any, **tensors: Tensor) -> Tensor:
        delta = tensors["B"] @ tensors["A"]
        delta = delta.flatten().index_add(0, tensors["places"].long(), tensors["d"]).view_as(weight)
        return delta + self._taken_off(weight, config, tensors["M"]) if config.sparsity else delta

    def changed(self, x: Tensor, adapter: str) -> Tensor:
        tensors, config = self.tensors(adapter), self.settings[adapter]
        change = F.linear(F.linear(x, tensors["A"]), tensors["B"])
        rows, columns = tensors["places"].long() // self.in_features, tensors["places"].long() % self.in_features
        change = change.index_add(-1, rows, x[..., columns] * tensors["d"])
        if not config.sparsity:
            return change
        return change + F.linear(x, self._taken_off(self.wide_weight(), config, tensors["M"]))

    def _taken_off(self, weight: Tensor, config: Any, M: Tensor) -> Tensor:
        return -weight * ~unpacked_bits(M, weight.shape) / config.scale_of(self.name)

    def score(self, adapter: str, parts: str) -> Tensor:
        """What ``prune_base`` ranks (m x n)."""
        low_rank, entries = self.update_of(adapter)
        found = torch.zeros_like(low_rank)
        for name, part in (("W", self.wide_weight()), ("AB", low_rank), ("S", entries)):
            found = found + part if name in parts else found
        return found


@torch.no_grad()
def prune_base(model: nn.Module, sparsity: float, score: str = "WABS", adapter: str = "default") -> None:
    """Switch off the share ``sparsity`` of the base's adapted weights, as many as asked for over all matrices together:
    those of the smallest |score|. The weights themselves stay.

    Args:
        score: W, WAB, WABS, AB or ABS: the sum of the weight, the update of low rank and its single entries.

    Raises:
        ValueError: for another value, or a model without DSEE.
    """
    number("in [0, 1)")("sparsity", sparsity)
    one_of(*SCORES)("score", score)
    layers = [layer for layer in adapter_layers(model) if isinstance(layer, DSEELayer) and layer.has(adapter)]
    if not layers:
        raise ValueError(f"adapter must be one of DSEEConfig, got {adapter!r}")
    keys = [keys_of(layer.score(adapter, score)).flatten() for layer in layers]
    workspace, total = Workspace(), sum(len(own) for own in keys)
    shards = [FullShard(own, number, workspace) for number, own in enumerate(keys)]
    choices = [Choice(shard, len(own), partial(_slice, own)) for shard, own in zip(shards, keys, strict=True)]
    for layer, own, places in zip(layers, keys, largest_of_all(choices, total - int(sparsity * total)), strict=True):
        mask = torch.zeros(len(own), dtype=torch.bool, device=own.device)
        mask[places] = True
        layer.tensors(adapter)["M"].copy_(packed_bits(mask))
        layer.settings[adapter].sparsity = sparsity


def _slice(keys: Tensor, begin: int, end: int) -> Tensor:
    return keys[begin:end]


def _low_rank(weight: Tensor, r: int, seed: int) -> Tensor:
    U, S, V = svd_factors(weight, r, seed)
    return (U * S) @ V


def sparse_part(weight: Tensor, generator: torch.Generator) -> Tensor:
    """S of W = U V + S by the authors' greedy decomposition, whose rank grows by five as often as it fits.

    U = qr((W - S) V^T).Q;   V = U^T (W - S);   S = W - U V where that is at least 0.01
    """
    m, n = weight.shape
    V = torch.randn(1, n, generator=generator).to(weight.device)
    S = torch.zeros_like(weight)
    for _ in range(OUTER):
        for _ in range(INNER):
            U = torch.linalg.qr((weight - S) @ V.mT).Q
            V = U.mT @ (weight - S)
            left = weight - U @ V
            S = torch.where(left.abs() < SMALL, 0.0, left)
        if len(V) + ROWS > min(m, n) // 2:
            break
        V = torch.cat([V, torch.linalg.qr((weight - U @ V - S).mT).Q[:, :ROWS].mT])
    return S
