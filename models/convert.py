"""Replaces a model's linear layers by layers of ``gracile.models.layers``, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..target_modules import DEFAULT_TARGETS, experts_of, targets
from .core.expert_layers import ExpertLayers, FactoredExperts, put, take_out
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
            (also meta) and training mode are kept; a layer that several names share remains shared. Experts in one
            tensor (E, m, n), as transformers' mixtures keep them, become E layers, from which each forward pass makes
            that tensor: memory for E m n elements until the backward pass has used it.
        layer: a class of ``gracile.models.layers``.
        target_modules: as for ``gracile.optim.param_groups``.
        keywords: the layer's own, such as ``rank``.

    Raises:
        ValueError: for a pattern that matches nothing, or quantized layers alone, a value that the layer refuses,
            weights that DeepSpeed ZeRO 3 has split already, or experts of a layer without a dense weight to train
            (``ParallelLinear``, ``ReLoRALinear`` with a dropout, those for inference).
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
    experts = {found.name: found for name, module in model.named_modules() for found in _experts(name, module)}
    weights = {name: module.weight for name, module in linears.items()}
    weights |= {name: found.module._parameters[found.tensor] for name, found in experts.items()}
    unfit = {name: "quantized" for name, weight in weights.items() if not weight.is_floating_point()}
    chosen = targets(model, target_modules, [name for name in weights if name not in unfit], unfit)
    split = next((name for name in chosen if hasattr(weights[name], "ds_id")), None)
    if split is not None:
        raise ValueError(
            f"{split} is split already (DeepSpeed ZeRO 3); build the model outside of zero.Init, and convert"
        )
    named = "name" in signature(layer).parameters  # seeds what the layer draws

    def made(name: str, module: nn.Module) -> FactoredLinear:
        own = {"name": name} if named else {}
        new = layer.from_linear(_plain(module), **own, **keywords)
        new.replaced = type(module)
        return new

    new = _made_once({name: linears[name] for name in chosen if name in linears}, made)
    layered = {name: experts[name].layers(made) for name in chosen if name in experts}
    _swap(model, new)
    for name, layers in layered.items():
        put(experts[name].module, {experts[name].tensor: layers})
    return model


def merge(model: Model) -> Model:
    """``model`` itself, with plain linear layers in place of those that ``convert`` put there.

    They are of the classes that were there before, and experts are parameters again: the model saves and loads
    without gracile.

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
    mixtures = [module for module in model.modules() if isinstance(module, FactoredExperts)]
    tensors = [{name: module.layers_of(name).merged() for name in module.tensors} for module in mixtures]
    theirs = {layer for module in mixtures for name in module.tensors for layer in module.layers_of(name).each()}
    every = model.named_modules(remove_duplicate=False)
    factored = {name: m for name, m in every if isinstance(m, FactoredLinear) and m not in theirs}
    _swap(model, _made_once(factored, lambda name, module: _merged(module)))
    for module, merged in zip(mixtures, tensors, strict=True):
        take_out(module, merged)
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


class _Experts(NamedTuple):
    """Experts in one tensor: ``name`` is what patterns choose them by, ``tensor`` their name in ``module``."""

    name: str
    module: nn.Module
    tensor: str

    def layers(self, made: Callable[[str, nn.Module], FactoredLinear]) -> ExpertLayers:
        """A layer for each expert.

        Raises:
            ValueError: where the module does not say how its matrices lie, or for a layer without a weight to train.
        """
        transposed = getattr(self.module, "is_transposed", None)
        if not isinstance(transposed, bool):
            raise ValueError(
                f"{self.name}: {type(self.module).__name__} does not say how its experts lie; set its is_transposed to "
                "False for (E, out, in) or True for (E, in, out), or choose target_modules without them"
            )
        weight = self.module._parameters[self.tensor]
        assert weight is not None
        each = [_linear(W.mT if transposed else W, self.module.training) for W in weight.detach()]
        layers = ExpertLayers((made(f"{self.name}.{e}", one) for e, one in enumerate(each)), self.tensor, transposed)
        try:
            with torch.no_grad():
                next(layers.each()).trained_weight()
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; choose another layer, or target_modules without experts") from None
        return layers.train(self.module.training)


def _experts(name: str, module: nn.Module) -> Iterator[_Experts]:
    for called, p in experts_of(name, module):
        tensor = next(own for own, held in module._parameters.items() if held is p)
        yield _Experts(called, module, tensor)


def _linear(weight: Tensor, training: bool) -> nn.Linear:
    """``weight`` (out x in), not copied, as a layer without a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear.train(training)


def _made_once(chosen: Mapping[str, Any], made: Callable[[str, Any], nn.Module]) -> dict[str, nn.Module]:
    """What takes the place of each module, the same where several names share it."""
    new: dict[int, nn.Module] = {}
    for name, module in chosen.items():
        if id(module) not in new:
            new[id(module)] = made(name, module)
    return {name: new[id(module)] for name, module in chosen.items()}


def _swap(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Called when all are made, so that a refused value changes nothing."""
    for name, module in new.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)
