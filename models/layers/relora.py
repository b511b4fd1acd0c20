"""ReLoRA: high-rank updates out of a sequence of low-rank ones.  Lialin et al. 2023, arXiv:2307.05695.

    W: m x n frozen,  A: r x n ~ U(-1/sqrt n, 1/sqrt n),  B: m x r = 0,  s = alpha / r
    y    =  x W^T + s dropout(x) A^T B^T + bias
    at times:  W <- W + s B A,   A <- drawn anew,   B <- 0         fold

``fold`` adds in fp32, and draws A from a generator of its own, so that every process has the same: a function of the
seed, the layer's name and how often it was folded. Of A and B only B is ever zero: the authors' wrapper can zero both,
which then never move. No trained scale: theirs is reset to where all gradients vanish.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...validation import is_real, is_whole, require
from .base import FactoredLinear, generator_of


class ReLoRALinear(FactoredLinear):
    """y = x W^T + s dropout(x) A^T B^T + bias, with a frozen W that takes s B A in when it is folded.

    ``from_linear`` keeps the weight.

    Args:
        rank: r, of A (rank x in) and B (out x rank).
        alpha: s = alpha / rank.
        dropout: probability, on what A sees. (The authors' is 0.1.)
        seed, name: what A is drawn from at each fold.
    """

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
        self._restart()
        self._reset_bias()

    @torch.no_grad()
    def take(self, linear: nn.Linear) -> None:
        super().take(linear)
        self.weight.copy_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        seen = F.dropout(x, self.dropout, self.training)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(seen, self.A), self.B)

    @torch.no_grad()
    def dense(self) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.addmm(self.weight.to(wide), self.B.to(wide), self.A.to(wide), alpha=self.scale).to(self.weight)

    @torch.no_grad()
    def fold(self) -> None:
        """Take s B A into W, and start A and B again: the layer computes what it did."""
        self.weight.copy_(self.dense())
        self.folds += 1
        self._restart()

    @torch.no_grad()
    def _restart(self) -> None:
        self.B.zero_()
        if self.A.is_meta:
            return
        drawn = torch.rand(self.A.shape, generator=generator_of(self.seed, self.name, int(self.folds)))
        self.A.copy_(drawn.mul_(2).sub_(1).mul_(self.in_features**-0.5))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"
