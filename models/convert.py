"""Replaces a model's linear layers by layers of ``gracile.models.layers``, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Any, TypeVar

from torch import nn

from ..target_modules import DEFAULT_TARGETS, experts_of, targets
from .layers import FactoredLinear

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    layer: type[FactoredLinear],
    target_modules: str | Iterable[str] = DEFAULT_TARGETS,
    **keywords: Any,
) -> Model:
    """``model`` itself, with ``layer`` in place of the linear layers whose names match.

    Args:
        model: any module; ``nn.Linear`` and the ``Conv1D`` of transformers' GPT-2 are linear layers. Dtype, device
            (also meta) and training mode are kept; a layer that several names share remains shared.
        layer: a class of ``gracile.models.layers``.
        target_modules: as for ``gracile.optim.param_groups``.
        keywords: the layer's own, such as ``rank``.

    Raises:
        ValueError: for a pattern that matches nothing, or quantized layers alone, a value that the layer refuses,
            or weights that DeepSpeed ZeRO 3 has split already.
        TypeError: for a keyword that the layer does not take.

    Example:
        >>> from torch import nn
        >>> from gracile.models.convert import convert
        >>> from gracile.models.layers import SparseLowRankLinear
        >>> model = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "lm_head": nn.Linear(64, 256)})
        >>> convert(model, SparseLowRankLinear, ["q_proj"], rank=4)
        ModuleDict(
          (q_proj): SparseLowRankLinear(in_features=64, out_features=64, bias=True, rank=4, alpha=32, density=0.03)
          (lm_head): Linear(in_features=64, out_features=256, bias=True)
        )
    """
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_linear(module)}
    unfit = {name: "quantized" for name, module in linears.items() if not module.weight.is_floating_point()}
    mixtures = (experts_of(name, module) for name, module in model.named_modules())
    unfit |= {name: "experts in one tensor, which no layer here replaces" for held in mixtures for name, _ in held}
    whole = {name: module for name, module in linears.items() if name not in unfit}
    chosen = {name: whole[name] for name in targets(model, target_modules, whole, unfit)}
    split = next((name for name, module in chosen.items() if hasattr(module.weight, "ds_id")), None)
    if split is not None:
        raise ValueError(
            f"{split} is split already (DeepSpeed ZeRO 3); build the model outside of zero.Init, and convert"
        )

    def made(name: str, module: nn.Module) -> nn.Module:
        own = {"name": name} if "name" in signature(layer).parameters else {}  # seeds what the layer draws
        new = layer.from_linear(_plain(module), **own, **keywords)
        new.replaced = type(module)
        return new

    _swap(model, chosen, made)
    return model


def merge(model: Model) -> Model:
    """``model`` itself, with plain linear layers in place of those that ``convert`` put there.

    They are of the classes that were there before: the model saves and loads without gracile.

    Args:
        model: any module, which computes afterwards what it did before, up to rounding.

    Raises:
        ValueError: for a layer that is not linear, such as ``ParallelLinear``.

    Example:
        >>> from torch import nn
        >>> from gracile.models.convert import convert, merge
        >>> from gracile.models.layers import LowRankLinear
        >>> model, x = convert(nn.Sequential(nn.Linear(64, 32)), LowRankLinear, ["0"], rank=4), torch.randn(16, 64)
        >>> before = model(x)
        >>> merge(model)
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=True)
        )
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
    """
    every = model.named_modules(remove_duplicate=False)
    factored = {name: module for name, module in every if isinstance(module, FactoredLinear)}
    _swap(model, factored, lambda name, module: _merged(module))
    return model


def _merged(module: FactoredLinear) -> nn.Module:
    plain = module.merge()
    if issubclass(module.replaced, nn.Linear):
        return plain
    turned: Any = module.replaced(module.out_features, module.in_features)
    turned.weight = nn.Parameter(plain.weight.detach().T.contiguous())
    turned.bias = plain.bias
    return turned.train(module.training)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _plain(module: nn.Module) -> nn.Linear:
    """``nn.Linear`` as it is; GPT-2's Conv1D, whose weight is in x out, transposed."""
    if isinstance(module, nn.Linear):
        return module
    turned: Any = module
    n, m = turned.weight.shape
    linear = nn.Linear(n, m, device="meta")
    linear.weight, linear.bias = nn.Parameter(turned.weight.detach().T), nn.Parameter(turned.bias.detach())
    return linear.train(module.training)


def _swap(model: nn.Module, chosen: Mapping[str, Any], made: Callable[[str, Any], nn.Module]) -> None:
    new: dict[int, nn.Module] = {}  # all are made before any is put in, so that a refused value changes nothing
    for name, module in chosen.items():
        if id(module) not in new:
            new[id(module)] = made(name, module)
    for name, module in chosen.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new[id(module)])
