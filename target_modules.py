"""Layers by name, in one way for ranks, masks and conversions: ``"all-linear"``, parts of names or regular expressions,
each of which must match something."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor, nn

from .validation import nearest

# The linear layers of a transformer block in the LLaMA, Qwen and GPT-2 families, as the papers choose them.
DEFAULT_TARGETS = ("attn", "mlp")
ALL_LINEAR = "all-linear"
# The same where transformers calls them otherwise, by a model's ``config.model_type``: what the default means there.
FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt_neox",), ("attention", "mlp")),
    **dict.fromkeys(("bloom", "falcon"), ("self_attention", "mlp")),
    **dict.fromkeys(
        ("opt", "bart", "mbart", "whisper", "m2m_100", "pegasus"), ("self_attn", "encoder_attn", "fc1", "fc2")
    ),
    **dict.fromkeys(("mpt",), ("attn", "ffn")),
    **dict.fromkeys(("mamba", "falcon_mamba", "mamba2"), ("mixer",)),
    **dict.fromkeys(("t5", "mt5", "umt5"), ("SelfAttention", "EncDecAttention", "DenseReluDense")),
    **dict.fromkeys(
        ("bert", "roberta", "electra", "xlm-roberta", "camembert"), ("attention", "intermediate", r".*output\.dense")
    ),
    **dict.fromkeys(("distilbert",), ("attention", "ffn")),
    **dict.fromkeys(("wav2vec2", "hubert"), ("attention", "feed_forward")),
}
# What families call the parts of a block: published lists name several, of which a model has some.
ATTENTION_PARTS, MLP_PARTS = ("attn", "attention"), ("mlp", "ffn", "feed_forward")
BLOCK_PARTS = (*ATTENTION_PARTS, *MLP_PARTS)
ROUTERS = ("gate", "router", "shared_expert_gate")  # of a mixture of experts, by the last part of their names


def targets(
    model: nn.Module, target_modules: str | Iterable[str], names: Collection[str], unfit: Mapping[str, str]
) -> list[str]:
    """Those of ``names`` that are chosen, in their order.

    Args:
        model: whose family says what the default means, and which layer is the output, which ``"all-linear"`` leaves
            out.
        target_modules: ``"all-linear"``; a list of patterns, each a part of a name or a regular expression for all of
            it; or one regular expression for all of a name. The router of a mixture of experts is chosen where a
            pattern names it (``"gate"``), and not by ``"mlp"``.
        names: of layers with a matrix to choose.
        unfit: other layers, each with the reason why it cannot be chosen.

    Raises:
        ValueError: for no patterns, or one that matches none.
    """
    target_modules = _of_family(model, target_modules)
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not patterns:
        raise ValueError("target_modules is empty; name the layers that it is for")
    if patterns == [ALL_LINEAR]:
        output = output_layers(model)
        chosen = [name for name in names if name not in output and not _is_router(name)]
        if not chosen:
            raise ValueError(f"target_modules: no layer is a trainable linear one{_reasons(unfit)}")
        return chosen
    whole_name = isinstance(target_modules, str)
    matches = {pattern: _matching("target_modules", pattern, names, whole_name) for pattern in patterns}
    matches = {pattern: {n for n in matched if not _is_router(n, pattern)} for pattern, matched in matches.items()}
    for pattern in (pattern for pattern, matched in matches.items() if not matched):
        those = {name: unfit[name] for name in _matching("target_modules", pattern, unfit, whole_name)}
        if those or pattern not in BLOCK_PARTS or not any(matches.values()):
            raise _unmatched("target_modules", pattern, names, those)
    matched_by_any = set().union(*matches.values())
    return [name for name in names if name in matched_by_any]


def found(key: str, patterns: list[str], names: Collection[str], whole_name: bool) -> dict[str, set[str]]:
    """The names that each pattern matches, at least one.

    Args:
        key: what the user calls the patterns.
        whole_name: whether a pattern is a regular expression for all of a name, and not possibly a part of it.

    Raises:
        ValueError: for a pattern that matches none.
    """
    matches = {pattern: _matching(key, pattern, names, whole_name) for pattern in patterns}
    for pattern, matched in matches.items():
        if not matched:
            raise _unmatched(key, pattern, names, {})
    return matches


def _of_family(model: nn.Module, target_modules: str | Iterable[str]) -> str | Iterable[str]:
    """What is meant for ``model``: where it is the default, its family's names. They are the parts of all its members,
    of which some have no cross-attention."""
    if target_modules not in (DEFAULT_TARGETS, list(DEFAULT_TARGETS)):
        return target_modules
    kind = getattr(getattr(model, "config", None), "model_type", None)
    named = FAMILIES.get(str(kind), DEFAULT_TARGETS)
    every = [name for name, _ in model.named_modules()]
    return [pattern for pattern in named if _matching("target_modules", pattern, every, False)] or named


def experts_of(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors (E, m, n) of ``module`` that hold a matrix of each expert of a mixture, by their names: transformers'
    mixtures keep them so. Other tensors of three dimensions, such as convolutions, are none."""
    told = any(hasattr(module, key) for key in ("num_experts", "num_local_experts"))
    for part, p in module._parameters.items():
        whole = f"{name}.{part}".removeprefix(".")
        called = "expert" in f"{whole} {type(module).__name__}".lower()
        if p is not None and len(getattr(p, "ds_shape", p.shape)) == 3 and (told or called):
            yield whole.removesuffix(".weight"), p


def names_to_choose_by(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Of ``modules``, by name, what patterns know each by: the layers that ``convert`` puts in place of experts in one
    tensor are chosen as these were."""
    names = dict(zip(modules, modules, strict=True))
    for name in modules:
        parent = name.rpartition(".")[0]
        tensor = getattr(modules.get(parent), "tensor_replaced", None)
        if isinstance(tensor, str):
            names[name] = f"{parent.rpartition('.')[0]}.{tensor}".removeprefix(".").removesuffix(".weight")
    return names


def left_out_on_purpose(target_modules: str | Iterable[str]) -> tuple[str, ...]:
    """What the part of a block is called that is not meant, where patterns name the other part alone."""
    patterns = {target_modules} if isinstance(target_modules, str) else set(target_modules)
    if patterns <= set(MLP_PARTS):
        return ATTENTION_PARTS
    return MLP_PARTS if patterns <= set(ATTENTION_PARTS) else ()


def output_layers(model: nn.Module) -> set[str]:
    """The names of the layer that a model says is its output, such as transformers' models do."""
    find_output = getattr(model, "get_output_embeddings", None)
    output = find_output() if callable(find_output) else None
    if output is None:
        return set()
    weight = getattr(output, "weight", None)
    every = model.named_modules(remove_duplicate=False)
    return {name for name, m in every if m is output or (weight is not None and getattr(m, "weight", None) is weight)}


def reason_against(weight: Tensor) -> str | None:
    """Why a matrix cannot be trained as one, in a word; None where it can."""
    if not weight.is_floating_point():
        return "quantized"
    return None if weight.requires_grad else "frozen"


def _is_router(name: str, pattern: str = "") -> bool:
    own = name.rpartition(".")[2]
    return own in ROUTERS and own not in pattern


def _unmatched(key: str, pattern: str, names: Collection[str], unfit: Mapping[str, str]) -> ValueError:
    if unfit:
        return ValueError(f"{key}: {pattern!r} matches no trainable linear layer{_reasons(unfit)}")
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    hint = nearest(pattern, parts)
    if key == "target_modules" and hint.startswith("known"):
        hint += f"; {ALL_LINEAR!r} takes every linear layer but the output"
    return ValueError(f"{key}: {pattern!r} matches no trainable linear layer; {hint}")


def _reasons(unfit: Mapping[str, str]) -> str:
    """Of layers that cannot be chosen, how many for which reason."""
    counts = {reason: sum(other == reason for other in unfit.values()) for reason in sorted(set(unfit.values()))}
    told = " and ".join(f"{count} {'is' if count == 1 else 'are'} {reason}" for reason, count in counts.items())
    return f": {told}" if told else ""


def _matching(key: str, pattern: str, names: Iterable[str], whole_name: bool) -> set[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is not a regular expression ({error})") from None
    return {name for name in names if expression.fullmatch(name) or (not whole_name and pattern in name)}
