"""Base classes of linear layers whose weight is computed from other parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...layer_registry import register

Layer = TypeVar("Layer", bound="FactoredLinear")
Parts = Mapping[str, Tensor]  # the parameters and buffers of a layer by their own names, each whole


class FactoredLinear(nn.Module, ABC):
    """y = x W^T + bias, where W (out x in) is not a parameter itself: the base of the layers in this package.

    Args:
        in_features: n, the columns of W.
        out_features: m, the rows of W.
        bias: whether there is one, as ``nn.Linear`` draws it.
        device: where the parameters are made, as for ``nn.Linear``; ``"meta"`` allocates nothing.
        dtype: of the parameters, as for ``nn.Linear``.

    Raises:
        TypeError: where this class itself is constructed, which is abstract.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import FactoredLinear, LowRankLinear
        >>> layer = LowRankLinear.from_linear(nn.Linear(64, 32), rank=4)
        >>> isinstance(layer, FactoredLinear), tuple(layer.dense().shape)
        (True, (32, 64))
        >>> layer.merge()
        Linear(in_features=64, out_features=32, bias=True)
    """

    replaced: type[nn.Module] = nn.Linear  # the class of the layer that it replaces
    is_linear: bool = True  # False where no W computes the same: such a layer cannot be merged

    def __new__(cls, *_: Any, **__: Any) -> FactoredLinear:
        layer = super().__new__(cls)  # here, for copies and pickles do not call __init__
        register(layer)
        return layer

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @abstractmethod
    def dense(self) -> Tensor:
        """W (out x in), computed now; detached."""

    def trained_weight(self) -> Tensor:
        """W (out x in), computed now, through which parameters get the gradients that a pass of the layer gives them.

        Raises:
            ValueError: for a layer without such a weight.
        """
        raise ValueError(f"{self} gives no gradients through a dense weight")

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new values for all parameters."""

    def parts(self) -> dict[str, Tensor]:
        """The layer's parameters and buffers. Methods that change a layer accept others in their place: an optimizer
        gathers them, where an engine splits parameters or keeps fp32 copies."""
        own = chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False))
        return {name: tensor.detach() for name, tensor in own}

    def _reset_bias(self) -> None:
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def finish(self) -> None:
        """The last change when training is over, before the layer is merged; none for most layers."""

    def merge(self) -> nn.Linear:
        """A plain layer that computes the same, on the same device and in the same dtype.

        Raises:
            ValueError: for a layer that is not linear, such as ``ParallelLinear``.
        """
        weight = self.dense()
        keys = {"device": weight.device, "dtype": weight.dtype}
        plain = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None, **keys)
        with torch.no_grad():
            plain.weight.copy_(weight)
            if self.bias is not None:
                plain.bias.copy_(self.bias)
        return plain.train(self.training)

    @classmethod
    def from_linear(cls: type[Layer], linear: nn.Linear, **keywords: Any) -> Layer:
        """A layer in place of ``linear``, of its shape, dtype, device and bias; the class says what becomes of W."""
        keys: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **keys, **keywords)
        layer.take(linear)
        return layer.train(linear.training)

    @torch.no_grad()
    def take(self, linear: nn.Linear) -> None:
        """Copy what is kept of a plain layer: the bias."""
        if self.bias is not None:
            self.bias.copy_(linear.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FactoredWeight(FactoredLinear):
    """A layer that starts from the factors of a weight: a given one, or one drawn as ``nn.Linear``'s."""

    @abstractmethod
    def factor(self, weight: Tensor) -> None:
        """Factor ``weight`` (out x in); does nothing on the meta device."""

    def reset_parameters(self) -> None:
        bound, like = self.in_features**-0.5, next(self.parameters())
        drawn = torch.empty(self.out_features, self.in_features, device=like.device, dtype=like.dtype)
        self.factor(nn.init.uniform_(drawn, -bound, bound))
        self._reset_bias()

    @torch.no_grad()
    def take(self, linear: nn.Linear) -> None:
        super().take(linear)
        self.factor(linear.weight)


class DenseWeight(FactoredLinear):
    """Trains a dense weight, a given one or drawn as ``nn.Linear``'s, and computes with a function of it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **placed: Any) -> None:
        super().__init__(in_features, out_features, bias, **placed)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **placed))

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self._reset_bias()

    @torch.no_grad()
    def take(self, linear: nn.Linear) -> None:
        super().take(linear)
        self.weight.copy_(linear.weight)


def as_rows(tensor: Tensor) -> Tensor:
    """A tensor (... x n) as a matrix (N x n), also where N is zero."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
