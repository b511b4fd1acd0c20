"""Linear layers and embeddings whose weights are kept in 8 bits, and nowhere wider.

    Y = X W^T      W opened for the product, and let go; backward opens it again for dX = dY W
    dW = dY^T X    an ordinary tensor, in the dtype that W is opened in

The optimizers of ``gracile.optim`` write such weights back by blocks of rows, rounded by chance with
``stochastic_rounding=True`` (Q-GaLore, arXiv:2407.08296). Those of torch move them too: opened whole, and to nearest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..int8_weight import GROUP, Int8Weight, is_int8, opened, quantize
from ..target_modules import targets

Model = TypeVar("Model", bound=nn.Module)
CODES, SCALES = "weight_codes", "weight_scales"  # in a state dict


class _Product(torch.autograd.Function):
    """X W^T + b. Kept for the backward pass are X, codes and scales."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight.codes, weight.scales)
        ctx.told = weight.group_size, weight.columns, weight.dtype
        return F.linear(x, opened(weight.codes, weight.scales, weight.group_size, weight.columns, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scales = ctx.saved_tensors
        group_size, columns, dtype = ctx.told
        of_x, of_weight, of_bias = ctx.needs_input_grad
        (G,) = gradients
        flat = G.reshape(-1, G.shape[-1])
        dx = G @ opened(codes, scales, group_size, columns, G.dtype) if of_x else None
        dW = (flat.t() @ x.reshape(-1, columns)).to(dtype) if of_weight else None
        return dx, dW, flat.sum(0) if of_bias else None


class _Lookup(torch.autograd.Function):
    """Some rows of a matrix; only these are opened."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Int8Weight, padding: int, by_frequency: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.told = weight.shape[0], padding, by_frequency, weight.dtype
        flat = ids.reshape(-1)
        rows = opened(weight.codes[flat], weight.scales[flat], weight.group_size, weight.columns, weight.dtype)
        return rows.view(*ids.shape, weight.columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), (count, padding, by_frequency, dtype) = ctx.saved_tensors, ctx.told
        grad = torch.ops.aten.embedding_dense_backward(gradients[0], ids, count, padding, by_frequency)
        return None, grad.to(dtype), None, None


class _InInt8(nn.Module):
    """What layers with a weight in 8 bits have in common: how it is saved and loaded."""

    weight: Any

    def _held(self) -> Int8Weight:
        weight = self.weight
        if not isinstance(weight, Int8Weight):
            raise TypeError(
                f"the weight of this {type(self).__name__} was replaced by a {type(weight).__name__}: DeepSpeed makes "
                "flat tensors of parameters; split weights in 8 bits by FSDP2 (fully_shard)"
            )
        return weight

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, True)
        weight = destination.pop(f"{prefix}weight")
        if is_int8(weight):
            destination[prefix + CODES], destination[prefix + SCALES] = _parts_of(weight)
        else:
            destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()
        if destination.get(f"{prefix}bias") is not None and not keep_vars:
            destination[f"{prefix}bias"] = destination[f"{prefix}bias"].detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        names = prefix + CODES, prefix + SCALES
        if f"{prefix}weight" in own and not is_int8(own[f"{prefix}weight"]):
            error_msgs.append(
                f"{prefix}weight is an ordinary weight, and this layer keeps its in 8 bits: load it before "
                "gracile.models.int8.quantize_weights, or quantize the saved model too"
            )
            return
        if all(name in own for name in names):
            codes, scales = (own.pop(name) for name in names)
            here = self._described()
            given = tuple(codes.shape), tuple(scales.shape)
            if given != here or codes.dtype != torch.int8:
                error_msgs.append(f"{names[0]} and {names[1]} are of shapes {given}, in this layer of {here}")
                return
            own[f"{prefix}weight"] = _joined(codes, scales, self.weight)
        missing: list[str] = []
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        for name in missing:
            missing_keys += [one for one in names if one not in own] if name == f"{prefix}weight" else [name]

    def _described(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows, columns = self.weight.shape
        held = getattr(self.weight, "_local_tensor", self.weight)
        return (rows, columns), (rows, -(-columns // held.group_size))


class Int8Linear(_InInt8, nn.Linear):
    """``nn.Linear`` with its weight in 8 bits: ``weight`` is an ``Int8Weight`` (out_features, in_features), which looks
    like a tensor of the dtype that it is opened in; its gradient is an ordinary one.

    A state dict has ``weight_codes`` (int8, out x in) and ``weight_scales`` (fp32, out x in / group_size, rounded up).

    Args:
        in_features: as of ``nn.Linear``.
        out_features: as of ``nn.Linear``.
        bias: as of ``nn.Linear``; it is kept as it is.
        group_size: weights of a row that share a scale.
        device: as of ``nn.Linear``.
        dtype: that the weight is opened in.

    Raises:
        ValueError: for a group size below 1. ``load_state_dict`` raises RuntimeError for ordinary weights.

    Example:
        >>> import torch
        >>> from gracile.models.int8 import Int8Linear
        >>> layer = Int8Linear(512, 16)
        >>> layer(torch.randn(3, 512)).sum().backward()
        >>> layer.weight.dtype, layer.weight.codes.dtype, layer.weight.stored_bytes
        (torch.float32, torch.int8, 8320)
        >>> layer.weight.grad.shape
        torch.Size([16, 512])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int = GROUP,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_parameter("weight", nn.Parameter(quantize(self.weight, group_size)))

    def forward(self, input: Tensor) -> Tensor:
        bias: Tensor | None = self.bias
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input = input.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        elif input.dtype != self.weight.dtype:
            raise RuntimeError(f"the input is {input.dtype} and the weight is opened in {self.weight.dtype}")
        product: Tensor = _Product.apply(input, self._held(), bias)
        return product


class Int8Embedding(_InInt8, nn.Embedding):
    """``nn.Embedding`` with its weight in 8 bits, of which the rows that are looked up are opened.

    Args:
        num_embeddings: as of ``nn.Embedding``.
        embedding_dim: as of ``nn.Embedding``.
        padding_idx: as of ``nn.Embedding``.
        group_size: weights of a row that share a scale.
        device: as of ``nn.Embedding``.
        dtype: that rows are opened in.

    Raises:
        ValueError: for a group size below 1. ``load_state_dict`` raises RuntimeError for ordinary weights.

    Example:
        >>> import torch
        >>> from gracile.models.int8 import Int8Embedding
        >>> embedding = Int8Embedding(10, 64)
        >>> embedding(torch.tensor([[1, 2, 2]])).shape
        torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        group_size: int = GROUP,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.register_parameter("weight", nn.Parameter(quantize(self.weight, group_size)))

    def forward(self, input: Tensor) -> Tensor:
        padding = -1 if self.padding_idx is None else self.padding_idx
        rows: Tensor = _Lookup.apply(input, self._held(), padding, self.scale_grad_by_freq)
        return rows


KINDS: dict[type[nn.Module], type[_InInt8]] = {nn.Linear: Int8Linear, nn.Embedding: Int8Embedding}
# What a layer says of itself beside its parameters.
_SETTINGS = {
    "in_features", "out_features", "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type",
    "scale_grad_by_freq", "sparse",
}  # fmt: skip


def quantize_weights(
    model: Model,
    target_modules: str | Iterable[str] | None = None,
    group_size: int = GROUP,
    initialize: Callable[[nn.Module], None] | None = None,
) -> Model:
    """``model`` itself, with the weights of its linear layers and embeddings in 8 bits, one after the other. Before the
    optimizer is built, and before FSDP2 splits the model.

    Args:
        model: any module. Layers whose class is ``nn.Linear`` or ``nn.Embedding`` itself are replaced; biases, norms
            and other layers stay. What is tied stays tied; what is frozen stays frozen.
        target_modules: patterns as for ``gracile.optim.param_groups``; None for all, the output layer too.
        group_size: weights of a row that share a scale.
        initialize: called with each layer whose weights are on the meta device, to put weights there; they are in 8
            bits before it is called with the next. None leaves them on the meta device.

    Raises:
        ValueError: for a pattern that matches nothing, a model without such layers, a group size below 1, an embedding
            with ``max_norm`` or ``sparse``, or weights that are split already.

    Example:
        >>> from torch import nn
        >>> from gracile.models.int8 import quantize_weights
        >>> layers = {"embed": nn.Embedding(16, 8), "up": nn.Linear(8, 32), "norm": nn.LayerNorm(32)}
        >>> quantize_weights(nn.ModuleDict(layers))
        ModuleDict(
          (embed): Int8Embedding(16, 8)
          (up): Int8Linear(in_features=8, out_features=32, bias=True)
          (norm): LayerNorm((32,), eps=1e-05, elementwise_affine=True)
        )
    """
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if type(m) in KINDS}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear and no nn.Embedding to keep in 8 bits")
    chosen = list(layers) if target_modules is None else targets(model, target_modules, list(layers), {})
    for name in chosen:
        _refuse(name, layers[name])
    weights: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old ones kept where they are tied: ids are reused
    made: dict[int, tuple[nn.Module, nn.Module]] = {}  # likewise
    shared = _counts(model)
    for name in chosen:
        layer = layers.pop(name)
        if id(layer) not in made:
            weight: Any = layer.weight
            if id(weight) not in weights:
                if initialize is not None and weight.is_meta:
                    initialize(layer)
                new = nn.Parameter(quantize(layer.weight, group_size), requires_grad=weight.requires_grad)
                weights[id(weight)] = new, weight
            new_layer = _layer(KINDS[type(layer)], layer, weights[id(weight)][0])
            made[id(layer)] = new_layer, layer
            if shared[id(weight)] == 1:
                weights.pop(id(weight))
                layer.register_parameter("weight", None)  # before the next one is made
            del weight
        _put(model, name, made[id(layer)][0])
    return model


def dequantize_weights(model: Model) -> Model:
    """``model`` itself with ordinary layers, of the weights as they are opened: what ``quantize_weights`` replaced.

    Args:
        model: not split over processes.

    Raises:
        ValueError: for weights that FSDP2 has split.

    Example:
        >>> from torch import nn
        >>> from gracile.models.int8 import dequantize_weights, quantize_weights
        >>> dequantize_weights(quantize_weights(nn.Sequential(nn.Linear(8, 4))))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    of: dict[type[nn.Module], type[nn.Module]] = {kind: ordinary for ordinary, kind in KINDS.items()}
    weights: dict[int, nn.Parameter] = {}
    made: dict[int, tuple[nn.Module, nn.Module]] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, _InInt8):
            continue
        if id(layer) not in made:
            weight = layer.weight
            if not isinstance(weight, Int8Weight):
                raise ValueError(f"{name} is split over processes; gather the model's state dict, and load it whole")
            if id(weight) not in weights:
                with torch.no_grad():
                    weights[id(weight)] = nn.Parameter(weight.open(), requires_grad=weight.requires_grad)
            made[id(layer)] = _layer(of[type(layer)], layer, weights[id(weight)]), layer
        _put(model, name, made[id(layer)][0])
    return model


def _layer(kind: type[nn.Module], layer: nn.Module, weight: nn.Parameter) -> nn.Module:
    """A layer of class ``kind`` as ``layer`` is, hooks left out; no other weight is made on the way."""
    new = kind.__new__(kind)
    nn.Module.__init__(new)
    vars(new).update({key: value for key, value in vars(layer).items() if key in _SETTINGS})
    new.register_parameter("weight", weight)
    if "bias" in layer._parameters:
        new.register_parameter("bias", layer._parameters["bias"])
    return new.train(layer.training)


def _refuse(name: str, layer: nn.Module) -> None:
    if getattr(layer, "max_norm", None) is not None or getattr(layer, "sparse", False):
        raise ValueError(f"{name} is an embedding with max_norm or sparse gradients; leave it out of target_modules")
    if hasattr(layer.weight, "ds_id") or hasattr(layer.weight, "device_mesh"):
        raise ValueError(f"{name} is split over processes already; quantize the weights before the model is split")


def _counts(model: nn.Module) -> Counter[int]:
    """How many layers hold each parameter."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def _parts_of(weight: Any) -> tuple[Tensor, Tensor]:
    """Codes and scales; of a weight that FSDP2 has split, as DTensors."""
    held = getattr(weight, "_local_tensor", weight)
    if held is weight:
        return weight.codes.detach(), weight.scales.detach()
    from torch.distributed.tensor import DTensor

    def split(part: Tensor) -> Tensor:
        shape = torch.Size([weight.shape[0], part.shape[1]])
        return DTensor.from_local(
            part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=(part.shape[1], 1)
        )

    return split(held.codes.detach()), split(held.scales.detach())


def _joined(codes: Any, scales: Any, weight: Any) -> Tensor:
    """The inverse of ``_parts_of``, for the place of ``weight``."""
    held = getattr(weight, "_local_tensor", weight)
    if not hasattr(codes, "device_mesh"):
        return Int8Weight(codes, scales, held.dtype, held.group_size, held.columns)
    from torch.distributed.tensor import DTensor

    local = held.like(codes.to_local(), scales.to_local())
    return DTensor.from_local(
        local, codes.device_mesh, codes.placements, run_check=False, shape=codes.shape, stride=(codes.shape[1], 1)
    )
