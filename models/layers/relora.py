"""ReLoRA: high-rank updates out of a sequence of low-rank ones.  Lialin et al. 2023, arXiv:2307.05695.

    W: m x n frozen,  A: r x n ~ U(-1/sqrt n, 1/sqrt n),  B: m x r = 0,  s = alpha / r
    y    =  x W^T + s dropout(x) A^T B^T + bias
    at times:  W <- W + s B A,   A <- drawn anew,   B <- 0         fold

``fold`` adds in fp32 and rounds to a bf16 W at random, and draws from generators of its own, so that every process
has the same: functions of the seed, the layer's name and how often it was folded. Of A and B only B is ever zero: the
authors' wrapper can zero both, which then never move. No trained scale: theirs is reset to where all gradients
vanish.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...rng import generator_of
from ...validation import is_real, is_whole, require
from ..core.factored_linear import FactoredLinear, Parts

ROWS = 1024  # of W that are folded at a time


class ReLoRALinear(FactoredLinear):
    """y = x W^T + s dropout(x) A^T B^T + bias, with a frozen W that s B A is added to by ``fold`` (arXiv:2307.05695).

    ``from_linear`` keeps the weight. ``gracile.optim.ReLoRAAdamW`` calls ``fold`` every ``merge_every`` steps.

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        rank: r, of A (rank x in) and B (out x rank).
        alpha: s = alpha / rank.
        dropout: probability, of A's input. (The authors' is 0.1.)
        seed, name: what A is drawn from at each fold.
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Parameters: W (out x in), frozen, ``rank * (in + out)`` trained elements, and the bias.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import ReLoRALinear
        >>> layer, x = ReLoRALinear.from_linear(nn.Linear(64, 32), rank=4), torch.randn(16, 64)
        >>> _ = nn.init.normal_(layer.B)  # as training would have it
        >>> before = layer(x)
        >>> layer.fold()
        >>> torch.allclose(layer(x), before, atol=1e-3), bool(layer.B.any())  # the same function, and B is zero again
        (True, False)
    """

    method = "relora"

    folds: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        alpha: float = 32.0,
        dropout: float = 0.0,
        seed: int = 0,
        name: str = "",
        **placed: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **placed)
        require(is_whole(rank) and rank >= 1, "rank must be a whole number >= 1", rank)
        require(is_real(alpha) and alpha > 0, "alpha must be a number > 0", alpha)
        require(is_real(dropout) and 0 <= dropout < 1, "dropout must be a number in [0, 1)", dropout)
        require(is_whole(seed) and seed >= 0, "seed must be a whole number >= 0", seed)
        self.rank, self.alpha, self.dropout, self.seed, self.name = rank, alpha, dropout, seed, name
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **placed), requires_grad=False)
        self.A = nn.Parameter(torch.empty(rank, in_features, **placed))
        self.B = nn.Parameter(torch.empty(out_features, rank, **placed))
        self.register_buffer("folds", torch.zeros((), dtype=torch.int64, device=placed.get("device")))
        self.reset_parameters()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.folds.zero_()
        self._restart(self.parts())
        self._reset_bias()

    @torch.no_grad()
    def take(self, linear: nn.Linear) -> None:
        super().take(linear)
        self.weight.copy_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        seen = F.dropout(x, self.dropout, self.training)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(seen, self.A), self.B)

    def trained_weight(self) -> Tensor:
        if self.dropout:
            raise ValueError(f"{self} drops inputs, which a dense weight does not see: set dropout=0")
        return torch.addmm(self.weight, self.B, self.A, alpha=self.scale)

    @torch.no_grad()
    def dense(self) -> Tensor:
        return torch.cat([rows.to(self.weight) for rows in self._folded(self.parts())])

    @torch.no_grad()
    def fold(self, parts: Parts | None = None) -> None:
        """Take s B A into W, and start A and B again: the layer computes what it did.

        Args:
            parts: in place of the layer's own, written to.
        """
        held = self.parts() if parts is None else parts
        generator = generator_of(self.seed, self.name, "rounding", int(held["folds"]))
        for rows, wide in zip(held["weight"].split(ROWS), self._folded(held), strict=True):
            rows.copy_(_rounded(wide, generator) if rows.dtype == torch.bfloat16 else wide)
        held["folds"].add_(1)
        self._restart(held)

    def _folded(self, parts: Parts) -> Iterator[Tensor]:
        """W + s B A in fp32 at least, some rows at a time."""
        W, A, B = parts["weight"], parts["A"], parts["B"]
        wide = torch.promote_types(W.dtype, torch.float32)
        for rows, lines in zip(W.split(ROWS), B.split(ROWS), strict=True):
            yield torch.addmm(rows.to(wide), lines.to(wide), A.to(wide), alpha=self.scale)

    @torch.no_grad()
    def _restart(self, parts: Parts) -> None:
        parts["B"].zero_()
        if parts["A"].is_meta:
            return
        generator = generator_of(self.seed, self.name, int(parts["folds"]))
        drawn = torch.rand(parts["A"].shape, generator=generator, device="cpu")
        parts["A"].copy_(drawn.mul_(2).sub_(1).mul_(self.in_features**-0.5))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def _rounded(wide: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 as bf16, up or down at random, the likelier the nearer: rounded to the nearest, small changes would all be
    lost."""
    noise = torch.randint(2**16, wide.shape, generator=generator, dtype=torch.int32, device="cpu")
    bits = wide.view(torch.int32).add(noise.to(wide.device)).bitwise_and_(-(2**16))
    return torch.where(wide.isfinite(), bits.view(torch.float32), wide).bfloat16()
