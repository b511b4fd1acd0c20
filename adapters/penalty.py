"""Terms of the loss that a method adds for its tensors and for the model's outputs, without a Trainer of its own.

A hook of the base model adds them where the model returns a loss; ``with_penalty`` and ``penalized_loss`` add them to a
loss that is computed outside of it. Either counts them once a step: a pass brings its share of them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .config import AdapterConfig
from .gathering import is_away, is_split, whole
from .layer import AdapterLayer, Tensors

OF_THE_LOSS = ("labels", "num_items_in_batch", "shift_labels")  # what a model is given for its loss alone
# Passes in training that returned no loss, by their base models: what the terms on outputs will be made of
_unfinished: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Mapping[str, Any]]] = weakref.WeakKeyDictionary()


def adapter_layers(model: nn.Module) -> Iterator[AdapterLayer]:
    """The layers of a model that have adapters of this package."""
    return (module for module in model.modules() if isinstance(module, AdapterLayer))


def penalty(model: nn.Module) -> Tensor | None:
    """The mean over layers and active adapters of the methods' own terms, weighted; None where there are none.

    A model adds it to its loss by itself, in training, where it returns one; ``with_penalty`` adds it to another loss.
    """
    terms = [
        layer.penalty(layer.settings[adapter], **_all_of(layer, adapter))
        for layer in adapter_layers(model)
        for adapter in layer.active_adapters
        if layer.has(adapter) and not layer.disable_adapters and type(layer).penalty is not AdapterLayer.penalty
    ]
    held = [term for term in terms if term is not None]
    return torch.stack(held).mean() if held else None


def with_penalty(
    model: nn.Module,
    loss: Tensor,
    outputs: Any,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """``loss`` with the terms of the model's adapters, for a loss that the model did not compute; in evaluation, or
    without adapters that have terms, ``loss`` itself.

    Args:
        model: with adapters of this package; an engine's or DDP's wrapper of it will do.
        loss: of one pass.
        outputs: what the model returned, called without labels. It adds the terms by itself to a loss of its own.
        labels: of the pass, -100 where there is none; None counts all tokens.
        num_items_in_batch: labels of all passes of a step, by which ``loss`` is divided already, as in the Trainer's
            ``compute_loss_func``: a pass then brings its share of the terms. None for the mean of a pass, which is
            divided by the number of passes with all that is in it, by the loop, accelerate or DeepSpeed.

    Raises:
        ValueError: for outputs with a loss, a pass whose terms have been added already, or a number without labels.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from gracile.adapters import SorsaConfig, with_penalty
        >>> from gracile.models import build_llama
        >>> model = get_peft_model(build_llama("2m"), SorsaConfig(target_modules=["q_proj"], gamma=0.1)).train()
        >>> outputs = model(input_ids=torch.arange(8)[None])
        >>> loss = with_penalty(model, outputs.logits.square().mean(), outputs)
    """
    base = next((module for module in model.modules() if module in _unfinished), None)
    if not (model.training and torch.is_grad_enabled()) or (base is None and not _has_terms(model)):
        return loss
    if _loss_of(outputs, {}) is not None:
        raise ValueError(
            "outputs must have no loss, for the model has added its adapters' terms to it; call it without labels"
        )
    if base is None:
        raise ValueError("outputs must be of a pass of model in training, whose terms were not added before")
    if num_items_in_batch is not None and labels is None:
        raise ValueError("labels must be given with num_items_in_batch, for a pass brings its share of the terms")
    args, keywords = _unfinished.pop(base)
    keywords = {**keywords, "labels": labels, "num_items_in_batch": num_items_in_batch}
    term = _terms(base, args, keywords, outputs, has_loss=False)
    return loss if term is None else loss + term.to(loss)


def penalized_loss(model: nn.Module, compute_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``compute_loss`` with the terms of the model's adapters: for ``Trainer(compute_loss_func=...)``.

    Args:
        model: that the Trainer is given.
        compute_loss: called with outputs, labels and ``num_items_in_batch``, by which it divides a sum over labels.
    """

    def penalized(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss = compute_loss(outputs, labels, num_items_in_batch=num_items_in_batch)
        return with_penalty(model, loss, outputs, labels, num_items_in_batch)

    return penalized


# ---- the hook -------------------------------------------------------------------------------------------------------


def add_penalty(model: nn.Module, args: Any, keywords: Mapping[str, Any], outputs: Any) -> Any:
    """A forward hook of the base model: ``PeftModel`` without a task type passes its tuner by."""
    if not (model.training and torch.is_grad_enabled()):
        return outputs
    loss = _loss_of(outputs, keywords)
    if loss is None:
        if _may_have_terms(model):
            _unfinished[model] = args, dict(keywords)
        return outputs
    term = _terms(model, args, keywords, outputs, has_loss=True)
    if term is None:
        return outputs
    if isinstance(outputs, tuple):
        return (loss + term.to(loss), *outputs[1:])
    outputs["loss"] = loss + term.to(loss)
    return outputs


def warn_of_unfinished(model: nn.Module) -> None:
    """At a step of the optimizer: a pass whose loss was computed elsewhere, without the terms."""
    if _unfinished.pop(model, None) is not None and _has_terms(model):
        warnings.warn(
            "the model returned no loss in training, so that its adapters' terms are left out of it; add them by "
            "gracile.adapters.with_penalty, or in a Trainer by compute_loss_func=penalized_loss(model, ...)",
            stacklevel=2,
        )


def _loss_of(outputs: Any, keywords: Mapping[str, Any]) -> Tensor | None:
    if isinstance(outputs, tuple):  # return_dict=False
        first: Tensor | None = outputs[0] if keywords.get("labels") is not None else None
        return first
    return outputs.get("loss") if hasattr(outputs, "get") else None


def _logits_of(outputs: Any, has_loss: bool) -> Tensor:
    logits: Tensor = outputs[int(has_loss)] if isinstance(outputs, tuple) else outputs["logits"]
    return logits


def _may_have_terms(model: nn.Module) -> bool:
    own = any(type(layer).penalty is not AdapterLayer.penalty for layer in adapter_layers(model))
    return own or any(config.reads_outputs for config in _active(model).values())


def _has_terms(model: nn.Module) -> bool:
    with torch.no_grad():
        return any(config.reads_outputs for config in _active(model).values()) or penalty(model) is not None


def _terms(model: nn.Module, args: Any, keywords: Mapping[str, Any], outputs: Any, has_loss: bool) -> Tensor | None:
    """This pass's share of all terms."""
    own = penalty(model)
    share = _share(model, keywords)
    of_pass = of_outputs(model, args, keywords, lambda: _logits_of(outputs, has_loss), share)
    held = [term * share for term in (own, of_pass) if term is not None]
    return sum(held[1:], start=held[0]) if held else None


# ---- terms of tensors -----------------------------------------------------------------------------------------------


def _all_of(layer: AdapterLayer, adapter: str) -> Tensors:
    """What a term is made of. Under FSDP2 each process adds the same term, and the mean of gradients keeps it."""
    return {key: _read(layer, value) for key, value in layer.tensors(adapter).items()}


def _read(layer: AdapterLayer, tensor: Any) -> Tensor:
    if is_away(tensor):
        raise ValueError(
            f"a term of {layer.name}'s loss needs all of its factors, and ZeRO 3 has split them; set "
            f"stage3_param_persistence_threshold to at least {tensor.ds_numel}, or use ZeRO 2"
        )
    return whole(tensor)


# ---- terms of outputs -----------------------------------------------------------------------------------------------


def _active(model: nn.Module) -> dict[str, AdapterConfig]:
    return {
        adapter: layer.settings[adapter]
        for layer in adapter_layers(model)
        for adapter in layer.active_adapters
        if layer.has(adapter) and not layer.disable_adapters
    }


def of_outputs(
    model: nn.Module, args: Any, keywords: Mapping[str, Any], logits_of: Callable[[], Tensor], share: Tensor | float
) -> Tensor | None:
    """The terms that active adapters have on the model's outputs; None where there are none. Layers whose gradients a
    distance of the outputs gates are given its gradient, of which this pass is ``share``."""
    asking = {adapter: config for adapter, config in _active(model).items() if config.reads_outputs}
    if not asking:
        return None
    base = base_logits(model, args, keywords) if any(config.reads_base for config in asking.values()) else None
    logits, base, labels = _for_next(model, keywords, logits_of(), base)
    terms = []
    for adapter, config in asking.items():
        terms.append(config.of_outputs(logits, base, labels))
        distance = config.distance_of_outputs(logits, base, labels)
        if distance is not None:
            _give_gradients(model, adapter, distance, share)
    held = [term for term in terms if term is not None]
    return torch.stack(held).sum() if held else None


def _give_gradients(model: nn.Module, adapter: str, distance: Tensor, share: Tensor | float) -> None:
    layers = [layer for layer in adapter_layers(model) if layer.has(adapter) and not layer.disable_adapters]
    held = [getattr(layer, name)[adapter] for layer in layers for name in layer.adapter_layer_names]
    if any(is_split(p) for p in held):
        raise ValueError(
            f"adapter {adapter!r} gates gradients in the optimizer's step, and DeepSpeed and FSDP2 have split them; "
            "use DDP, or gradient_dropout=0"
        )
    found = iter(torch.autograd.grad(distance, held, retain_graph=True))
    for layer in layers:
        layer.take_distance(adapter, {name: next(found) for name in layer.trained}, share)


def _for_next(
    model: nn.Module, keywords: Mapping[str, Any], logits: Tensor, base: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits and labels as a causal model has them, each token's logits for the next label."""
    labels, shifted = keywords.get("labels"), keywords.get("shift_labels")
    if logits.dim() < 3 or (shifted is None and (labels is None or _shifts(model))):
        return logits, base, labels
    labels = labels if shifted is None else shifted
    assert labels is not None
    longer = [None if of is None else F.pad(of, (0, 0, 0, 1)) for of in (logits, base)]
    assert longer[0] is not None
    return longer[0], longer[1], F.pad(labels, (1, 0), value=-100)


@torch.no_grad()
def base_logits(model: nn.Module, args: Any, keywords: Mapping[str, Any]) -> Tensor:
    """What the model puts out with its adapters switched off, and without dropout."""
    layers = [layer for layer in adapter_layers(model) if not layer._disable_adapters]
    training = [module for module in model.modules() if module.training]
    given = {key: value for key, value in keywords.items() if key not in OF_THE_LOSS}
    try:
        for layer in layers:
            layer._disable_adapters = True
        for module in training:
            module.training = False
        return _logits_of(model(*args, **given), has_loss=False)
    finally:
        for layer in layers:
            layer._disable_adapters = False
        for module in training:
            module.training = True


# ---- shares ---------------------------------------------------------------------------------------------------------


def _share(model: nn.Module, keywords: Mapping[str, Any]) -> Tensor | float:
    """The Trainer divides a loss by the labels of all passes of a step: each brings its share of the term, of labels
    that are counted as the Trainer counts them."""
    total, shifted, labels = (keywords.get(key) for key in ("num_items_in_batch", "shift_labels", "labels"))
    if total is None or (shifted is None and labels is None):
        return 1.0
    if shifted is None:
        assert labels is not None
        shifted = labels[..., 1:] if _shifts(model) else labels
    return (shifted != -100).sum() / (total.to(shifted.device) if isinstance(total, Tensor) else total)


def _shifts(model: nn.Module) -> bool:
    """Whether the model's labels are those of its tokens, and its logits for the next."""
    kind: Any = getattr(model, "loss_type", None)
    of_the_next = LOSS_MAPPING.get(kind) is ForCausalLMLoss
    return of_the_next and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
