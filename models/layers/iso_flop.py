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
    """A larger, sparser layer with as many weights as a dense one (Sparse-IFT, arXiv:2303.11525): the base of three.

    ``sparse_parts`` names the parameters that an optimizer of masks, such as ``RigLAdamW``, shall keep sparse, and the
    density of each; ``gracile.optim.param_groups`` asks for it. ``from_linear`` keeps no weight: the method trains from
    scratch. At sparsity 0, where it is the layer it replaces, parallel and doped keep it.

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        sparsity: s, at least 0 and below 1.
        placed: a mapping of ``device`` and ``dtype``, as for ``FactoredLinear``.

    Raises:
        ValueError: for a sparsity out of range.
        TypeError: where this class itself is constructed, which is abstract.

    Example:
        >>> from gracile.models.layers import DopedLinear, FactorisedLinear, IsoFlopLinear, ParallelLinear
        >>> for kind in (ParallelLinear, FactorisedLinear, DopedLinear):
        ...     layer = kind(64, 32, bias=False, sparsity=0.5)
        ...     densities = layer.sparse_parts()
        ...     kept = sum(p.numel() * densities.get(name, 1) for name, p in layer.named_parameters())
        ...     print(isinstance(layer, IsoFlopLinear), list(densities), round(kept))  # nn.Linear(64, 32): 2048 weights
        True ['W0', 'W1'] 2048
        True ['U', 'V'] 2048
        True ['W'] 2048
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
        """The parameters that are to be masked, by name, and the share of each that is kept."""

    @abstractmethod
    def product(self) -> Tensor:
        """W (out x in) of a linear one."""

    @torch.no_grad()
    def dense(self) -> Tensor:
        return self.trained_weight()

    def trained_weight(self) -> Tensor:
        if not self.is_linear:
            raise ValueError(f"{self} is not linear: no plain layer computes what it does")
        return self.product()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={self.sparsity:g}"


class ParallelLinear(IsoFlopLinear):
    """y = sum over j of f(x W_j^T) + bias, with 1 / (1 - sparsity) branches (Sparse-IFT, arXiv:2303.11525).

    Not linear: it cannot be merged. Without an f the branches would be one matrix. Where f gives one sign only, as relu
    does, so does y: better for LLaMA's gate_proj and up_proj than for what is added to its residual stream.

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        sparsity: 0, 1/2, 2/3, 3/4, ...: of each branch.
        activation: f, ``relu``, ``gelu`` or ``silu``.
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Parameters: W0, W1, ... (out x in each, dense until an optimizer masks them), and the bias.

    Raises:
        ValueError: for another sparsity or activation; of ``merge`` and ``dense``, with more than one branch.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import ParallelLinear
        >>> from gracile.optim import RigLAdamW, param_groups
        >>> model = nn.Sequential(ParallelLinear(64, 32, sparsity=0.75), nn.Linear(32, 8))
        >>> optimizer = RigLAdamW(param_groups(model, sparsity=0.75, target_modules=["0"]), t_end=750)
        >>> [int(W.count_nonzero()) for name, W in model[0].named_parameters() if name != "bias"]  # 2048 of 8192
        [512, 512, 512, 512]
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
    """y = f(x V^T) U^T + bias, with a sparse V (rank x in) and a sparse U (out x rank) (Sparse-IFT, arXiv:2303.11525).

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        sparsity: about, of U and V: ``density`` is exact.
        activation: f, ``linear`` (none) or ``relu``, with which the layer cannot be merged.
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Parameters: U and V (dense until an optimizer masks them), and the bias.

    Raises:
        ValueError: for values out of range; of ``merge`` and ``dense``, with ``relu``.

    Example:
        >>> from gracile.models.layers import FactorisedLinear
        >>> layer = FactorisedLinear(64, 32, sparsity=0.5)
        >>> tuple(layer.U.shape), tuple(layer.V.shape)
        ((32, 48), (48, 64))
        >>> {name: round(density, 3) for name, density in layer.sparse_parts().items()}  # 2048 weights in all
        {'U': 0.444, 'V': 0.444}
        >>> layer.merge()
        Linear(in_features=64, out_features=32, bias=True)
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
    """y = x (W + U V)^T + bias, with a sparse W and a dense U (out x rank) and V (rank x in) (arXiv:2303.11525).

    Args:
        in_features, out_features, bias: as for ``FactoredLinear``.
        sparsity: about, of W: ``density`` is exact. Where it is too small for a rank of 1, W is dense, without U, V.
        placed: ``device`` and ``dtype``, as for ``FactoredLinear``.

    Parameters: W (out x in, dense until an optimizer masks it), U, V, and the bias.

    Raises:
        ValueError: for a sparsity out of range.

    Example:
        >>> from gracile.models.layers import DopedLinear
        >>> from gracile.optim import RigLAdamW, param_groups
        >>> layer = DopedLinear(64, 32, sparsity=0.5)
        >>> optimizer = RigLAdamW(param_groups(layer, sparsity=0.5, target_modules="all-linear"), t_end=750)
        >>> [int(p.count_nonzero()) for p in (layer.W, layer.U, layer.V)]  # 2048 weights in all
        [1088, 320, 640]
        >>> layer.merge()
        Linear(in_features=64, out_features=32, bias=True)
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
