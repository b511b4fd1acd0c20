"""Sparse-IFT: larger, sparser layers for the FLOPs of a dense one.  Thangarasa et al. 2023, arXiv:2303.11525.

    A dense m x n layer has m n weights and takes 2 m n FLOPs a token. At a sparsity s, with d = 1 - s, so do

    parallel     y  =  sum over j of f(x W_j^T),  j below 1/d      W_j: m x n of density d
    factorised   y  =  f(x V^T) U^T          U: m x r, V: r x n, of density d,  r = m n / (d (m + n))
    doped        y  =  x W^T + (x V^T) U^T   W: m x n of density d;  U: m x r, V: r x n, dense,  r = s m n / (m + n)

plus a bias; ``models/wide.py`` has the fourth. A layer draws no mask: an optimizer of masks does, told by
``sparse_parts`` which parameters it is for. Stored are also the zeros: m n / d numbers, of doped (1 + s) m n.

Departures from the authors' code: everything follows from s alone, where theirs takes a second number for the size that
can contradict it. Ranks are whole (factorised: a multiple of 8, upwards), and densities made again from them, so that
exactly m n weights stay. Starts go by the sparse fan-in: every branch has the variance of ``nn.Linear``, U V has, and W
and U V of doped have it together, of which theirs gives it to each. One branch has no f, and is the dense layer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...validation import is_real, require
from ..core.factored_linear import FactoredLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
MULTIPLE = 8  # what ranks and widths are rounded to, for fast products


def rounded_up(size: float) -> int:
    """To a multiple of 8. Upwards, so that no density is above one."""
    return MULTIPLE * math.ceil(size / MULTIPLE - 1e-9)


class IsoFlopLinear(FactoredLinear):
    """A layer of as many weights as a dense one has, in more places.

    ``from_linear`` keeps no weight: the method trains from scratch. At sparsity 0, where it is the layer it replaces,
    parallel and doped keep it.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, sparsity: float, placed: dict[str, Any]
    ) -> None:
        super().__init__(in_features, out_features, bias, **placed)
        right = is_real(sparsity) and 0 <= sparsity < 1
        require(right, "sparsity must be a number in [0, 1)", sparsity)
        self.sparsity = sparsity

    @abstractmethod
    def sparse_parts(self) -> dict[str, float]:
        """The parameters that are to be masked, by name, and the share of each that stays."""

    @abstractmethod
    def product(self) -> Tensor:
        """W (out x in) of a linear one."""

    @torch.no_grad()
    def dense(self) -> Tensor:
        if not self.is_linear:
            raise ValueError(f"{self} is not linear: no plain layer computes what it does")
        return self.product()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={self.sparsity:g}"


class ParallelLinear(IsoFlopLinear):
    """y = sum over j of f(x W_j^T) + bias, with 1 / (1 - sparsity) branches. Not linear: it cannot be merged.

    Without an f the branches would be one matrix. What f leaves of one sign, as relu does, y has too: LLaMA's
    gate_proj and up_proj can do with that better than what is added to its residual stream.

    Args:
        sparsity: 0, 1/2, 2/3, 3/4, ...: of each branch.
        activation: f, ``relu``, ``gelu`` or ``silu``.

    Raises:
        ValueError: for another sparsity or activation.
    """

    W0: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        activation: str = "silu",
        **placed: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, sparsity, placed)
        require(activation in ACTIVATIONS, f"activation must be one of {', '.join(ACTIVATIONS)}", activation)
        self.branches = round(1 / (1 - sparsity))
        whole = abs(self.branches * (1 - sparsity) - 1) < 2e-3  # three digits of 2/3 are enough
        require(whole, f"sparsity must be 1 - 1/k for k branches, such as {1 - 1 / self.branches:.4g}", sparsity)
        self.activation, self.is_linear = activation, self.branches == 1
        for j in range(self.branches):
            self.register_parameter(f"W{j}", nn.Parameter(torch.empty(out_features, in_features, **placed)))
        self.reset_parameters()

    def sparse_parts(self) -> dict[str, float]:
        return {f"W{j}": 1 / self.branches for j in range(self.branches)}

    def reset_parameters(self) -> None:
        bound = (self.branches / self.in_features) ** 0.5
        for name in self.sparse_parts():
            nn.init.uniform_(getattr(self, name), -bound, bound)
        self._reset_bias()

    @torch.no_grad()
    def take(self, linear: nn.Linear) -> None:
        super().take(linear)
        if self.is_linear:
            self.W0.copy_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_linear:
            return F.linear(x, self.W0, self.bias)
        y = reduce(torch.add, (self._branch(x, name) for name in self.sparse_parts()))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _branch(self, x: Tensor, name: str) -> Tensor:
        return ACTIVATIONS[self.activation](F.linear(x, getattr(self, name)))

    def product(self) -> Tensor:
        return self.W0.clone()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, branches={self.branches}, activation={self.activation}"


class FactorisedLinear(IsoFlopLinear):
    """y = f(x V^T) U^T + bias, with a V (rank x in) and a U (out x rank) that are both sparse.

    Args:
        sparsity: about, of U and V: ``density`` is exact.
        activation: f, ``linear`` (none) or ``relu``, with which the layer cannot be merged.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float,
        activation: str = "linear",
        **placed: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, sparsity, placed)
        require(activation in ("linear", "relu"), "activation must be one of linear, relu", activation)
        self.activation, self.is_linear = activation, activation == "linear"
        weights, sides = in_features * out_features, in_features + out_features
        self.rank = rounded_up(weights / ((1 - sparsity) * sides))
        self.density = weights / (self.rank * sides)
        self.U = nn.Parameter(torch.empty(out_features, self.rank, **placed))
        self.V = nn.Parameter(torch.empty(self.rank, in_features, **placed))
        self.reset_parameters()

    def sparse_parts(self) -> dict[str, float]:
        return {"U": self.density, "V": self.density}

    def reset_parameters(self) -> None:
        passed = 1.0 if self.is_linear else 0.5  # of the squares of what f sees
        first = (self.density * self.in_features) ** -0.5
        second = (3 / (passed * self.density * self.rank)) ** 0.5
        nn.init.uniform_(self.V, -first, first)
        nn.init.uniform_(self.U, -second, second)
        self._reset_bias()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.V)
        return F.linear(hidden if self.is_linear else hidden.relu(), self.U, self.bias)

    def product(self) -> Tensor:
        return self.U @ self.V

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, activation={self.activation}"


class DopedLinear(IsoFlopLinear):
    """y = x (W + U V)^T + bias, with a sparse W, and U (out x rank) and V (rank x in) that are dense.

    Args:
        sparsity: about, of W: ``density`` is exact. So small that no rank is left, W is dense, and there is no U.

    Raises:
        ValueError: for a sparsity out of range.
    """

    U: nn.Parameter  # None where the rank is 0: engines cannot split nothing
    V: nn.Parameter

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, sparsity: float, **placed: Any
    ) -> None:
        super().__init__(in_features, out_features, bias, sparsity, placed)
        weights, sides = in_features * out_features, in_features + out_features
        self.rank = math.floor(sparsity * weights / sides + 1e-9)
        self.density = (weights - self.rank * sides) / weights
        self.W = nn.Parameter(torch.empty(out_features, in_features, **placed))
        for name, shape in (("U", (out_features, self.rank)), ("V", (self.rank, in_features))):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **placed)) if self.rank else None)
        self.reset_parameters()

    def sparse_parts(self) -> dict[str, float]:
        return {"W": self.density}

    def reset_parameters(self) -> None:
        share = 0.5 if self.rank else 1.0  # of the variance
        bound = (share / (self.density * self.in_features)) ** 0.5
        nn.init.uniform_(self.W, -bound, bound)
        if self.rank:
            first, second = self.in_features**-0.5, (3 * share / self.rank) ** 0.5
            nn.init.uniform_(self.V, -first, first)
            nn.init.uniform_(self.U, -second, second)
        self._reset_bias()

    @torch.no_grad()
    def take(self, linear: nn.Linear) -> None:
        super().take(linear)
        if not self.rank:
            self.W.copy_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.W, self.bias)
        return y + F.linear(F.linear(x, self.V), self.U) if self.rank else y

    def product(self) -> Tensor:
        return torch.addmm(self.W, self.U, self.V) if self.rank else self.W.clone()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
