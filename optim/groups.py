"""A model's parameters as groups: matrices with a rank, and the rest. Every trainable parameter is owned once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..layer_registry import parts_among
from ..target_modules import (
    DEFAULT_TARGETS,
    experts_of,
    left_out_on_purpose,
    names_to_choose_by,
    output_layers,
    reason_against,
    targets,
)
from ..target_modules import found as found_names
from .core.group_checks import MATRIX_KEYS
from .distributed import full_shape

OTHER_MARKS = tuple(key for key in MATRIX_KEYS if key != "rank")  # what makes a group of matrices beside a rank
MASKS = ("sparsity", "density")
LEFT_OUT = 0.1  # share of the parameters from which it is said that no pattern matched them


class Target(NamedTuple):
    """A matrix by the name of its layer."""

    name: str
    parameter: Tensor
    density: float | None = None  # of a layer that says itself how much of it stays


def param_groups(
    model: nn.Module,
    rank: int | None = None,
    target_modules: str | Iterable[str] = DEFAULT_TARGETS,
    *,
    weight_decay: float | None = None,
    role: str | Mapping[str, str | None] | None = None,
    **matrix_keys: Any,
) -> list[dict[str, Any]]:
    """Groups for an optimizer of this package: target matrices with a rank, other weights, norms and biases.

    Args:
        model: any module; frozen parameters are left out, tied ones are in one group only.
        rank: of the target matrices. Without it, and without another key that marks them (``sparsity``, ``density``,
            ``n``, ``keep``), they have no group of their own, and the groups suit ``torch.optim`` too.
        target_modules: a list of patterns, each a part of a module's name or a regular expression for all of it; or
            one regular expression for all of the name; or ``"all-linear"``, every matrix but embeddings and the
            output layer. The default is what the model's family calls the matrices of a block. Each pattern must
            match, but for the usual names of a block's parts (``attn``, ``attention``, ``mlp``, ...), of which one
            must. Experts in one tensor (E, m, n) are E matrices under its name, as in ``mlp.experts.down_proj``; the
            router of a mixture of experts is chosen where a pattern names it.
        weight_decay: for the two groups of weights; None leaves it to the optimizer. Norms and biases get 0. The
            parameters that a layer of ``gracile.models.layers`` builds its weight from are weights, of any shape.
        role: for ``SCALE``: ``auto`` makes groups by what each matrix is for, as its module says: ``linear``,
            ``embedding``, ``head`` (the output layer, also where an embedding is tied to it) or ``transposed`` (GPT-2's
            Conv1D). A mapping from patterns to roles comes first, the first match counts; None there is for AdamW.
            ``target_modules`` has no say. Any other word is the one role of the target matrices.
        matrix_keys: further keys of the target matrices' group, such as ``update_proj_gap`` or ``scale``; the optimizer
            checks them. A mapping from patterns to values splits the group: ``num_heads={"q_proj": 32, "k_proj": 8}``
            holds for the targets whose names match, the first match counts, the others do without the key.

    With a ``sparsity`` or ``density``, layers that say which of their parameters are sparse (``sparse_parts``:
    ``ParallelLinear``, ``FactorisedLinear`` and ``DopedLinear``) have their own densities, one group for each, whether
    their names match or not: left dense, they would be more weights than those of the layers they replace.

    Raises:
        ValueError: for a pattern that matches no trainable matrix, with the reason where they are frozen or
            quantized, matrix keys without one that makes their group, or a matrix whose role is not known.

    Example:
        >>> from torch import nn
        >>> from gracile.optim import param_groups
        >>> layers = {"embed": nn.Embedding(256, 64), "q_proj": nn.Linear(64, 64), "norm": nn.LayerNorm(64)}
        >>> model = nn.ModuleDict(layers)
        >>> for group in param_groups(model, rank=8, target_modules=["q_proj"], weight_decay=0.1, scale=0.25):
        ...     print([tuple(p.shape) for p in group.pop("params")], group)
        [(64, 64)] {'rank': 8, 'scale': 0.25, 'weight_decay': 0.1}
        [(256, 64)] {'weight_decay': 0.1}
        [(64,), (64,), (64,)] {'weight_decay': 0.0}
    """
    if role == "auto" or isinstance(role, Mapping):
        return _by_role(model, {} if isinstance(role, str) else dict(role), weight_decay, matrix_keys)
    matrix_keys |= {} if role is None else {"role": role}
    marks = [key for key in OTHER_MARKS if matrix_keys.get(key) is not None]
    if rank is None and matrix_keys and not marks:
        keys = ", ".join(sorted(matrix_keys))
        raise ValueError(f"{keys} need a rank (or one of {', '.join(OTHER_MARKS)}), got rank=None")
    masked = any(key in MASKS for key in marks)
    matrices = [] if rank is None and not marks else list(_targets(model, target_modules, masked))
    chosen = {id(target.parameter) for target in matrices}
    converted = any(target.density is not None for target in matrices)  # and what stays dense was chosen then
    if matrices and not converted:
        _tell_what_is_left_out(model, chosen, left_out_on_purpose(target_modules))
    trainable = [p for p in model.parameters() if p.requires_grad]  # lists a tied parameter once
    others = [p for p in trainable if id(p) not in chosen]
    factors = {number for number, part in parts_among(others).items() if part.name != "bias"}
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}  # of experts, they have two sides
    weights = {id(p) for p in others if (_dim(p) > 1 and id(p) not in biases) or id(p) in factors}
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    marked = {} if rank is None else {"rank": rank}
    plain = dict.fromkeys(marks)  # also where the optimizer's own default is another
    groups = [
        *({"params": params, **marked, **keys, **decay} for params, keys in _split(matrices, matrix_keys)),
        {"params": [p for p in others if id(p) in weights], **plain, **decay},
        {"params": [p for p in others if id(p) not in weights], **plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _by_role(
    model: nn.Module, named: dict[str, str | None], weight_decay: float | None, keys: dict[str, Any]
) -> list[dict[str, Any]]:
    """A group for each role that there is, one for weights without, one for norms and biases."""
    find_output = getattr(model, "get_output_embeddings", None)
    head = getattr(find_output() if callable(find_output) else None, "weight", None)
    held: dict[
        str, tuple[nn.Module, Tensor]
    ] = {}  # each once, by the name of its layer or, in a layer with more, its own
    for prefix, module in model.named_modules():
        for part, p in module._parameters.items():
            if p is not None and p.requires_grad and _dim(p) > 1 and not any(p is q for _, q in held.values()):
                held[f"{prefix}.{part}".removeprefix(".").removesuffix(".weight")] = module, p
    found = found_names("role", list(named), held, False)
    roles: dict[str, str | None] = {}
    for name, (module, p) in held.items():
        patterns = [pattern for pattern in named if name in found[pattern]]
        roles[name] = named[patterns[0]] if patterns else "head" if p is head else _role_of(name, module, p)
    if "head" not in roles.values():
        raise ValueError("role: the model does not tell its output layer; name it, as in role={'lm_head': 'head'}")
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = [
        {
            "params": [held[name][1] for name in roles if roles[name] == role],
            "role": role,
            **(keys if role else {}),
            **decay,
        }
        for role in [*dict.fromkeys(role for role in roles.values() if role), None]
    ]
    vectors = [p for p in model.parameters() if p.requires_grad and _dim(p) <= 1]
    groups.append({"params": vectors, "role": None, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _role_of(name: str, module: nn.Module, p: Tensor) -> str:
    if _dim(p) == 2 and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if _dim(p) == 2 and isinstance(module, nn.Linear):
        return "linear"
    if _dim(p) == 2 and type(module).__name__ == "Conv1D":  # transformers', which is not imported for it
        return "transposed"
    kind, shape = type(module).__name__, full_shape(p)
    raise ValueError(
        f"role: {name} of a {kind} {shape} has no known one; name it, as in role={{{name!r}: None}} (AdamW)"
    )


def _dim(parameter: Tensor) -> int:
    return len(full_shape(parameter))


def _targets(model: nn.Module, target_modules: str | Iterable[str], masked: bool) -> Iterator[Target]:
    matrices = list(_matrices(model, masked))
    reasons = [(target, reason_against(target.parameter)) for target in matrices]
    candidates = [target for target, reason in reasons if reason is None]
    names = dict.fromkeys(target.name for target in candidates)
    unfit = {target.name: reason for target, reason in reasons if reason is not None and target.name not in names}
    matched = set(targets(model, target_modules, names, unfit))
    yield from (target for target in candidates if target.name in matched or target.density is not None)


def _matrices(model: nn.Module, masked: bool) -> Iterator[Target]:
    """Layers with a matrix of their own, trainable or not: nn.Linear and its like (GPT-2's Conv1D), not embeddings; and
    tensors of experts, or the layers that stand for one, under its name. Of an optimizer of masks, also matrices that
    their layers call sparse."""
    modules = dict(model.named_modules())
    names = names_to_choose_by(modules)
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    for name, module in modules.items():
        tell = getattr(module, "sparse_parts", None) if masked else None
        densities: Mapping[str, float | None] = {"weight": None} if tell is None else tell()
        for part, density in densities.items():
            p = module._parameters.get(part)
            if p is not None and _dim(p) == 2 and id(p) not in embeddings:
                yield Target(names[name], p, density)
        yield from (Target(part, p) for part, p in experts_of(name, module))


def _tell_what_is_left_out(model: nn.Module, chosen: Collection[int], on_purpose: tuple[str, ...]) -> None:
    """One line where weights that are neither embeddings nor the output are not matched, with their share; those of
    layers with one of the names ``on_purpose`` do not count."""
    outputs = output_layers(model)
    others, sizes = {}, {}
    for prefix, module in model.named_modules():
        for part, p in module._parameters.items():
            if p is None or not p.requires_grad:
                continue
            sizes[id(p)] = math.prod(full_shape(p))
            aside = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or prefix in outputs or _dim(p) < 2
            aside = aside or any(part_of_block in prefix for part_of_block in on_purpose)
            if id(p) not in chosen and not aside:
                others[id(p)] = f"{prefix}.{part}".removesuffix(".weight"), full_shape(p)
    share = sum(sizes[i] for i in others) / max(1, sum(sizes.values()))
    if share >= LEFT_OUT:
        name, shape = max(others.values(), key=lambda item: math.prod(item[1]))
        warnings.warn(
            f"target_modules leaves out {share:.0%} of the parameters, such as {name} {shape}: they get the plain rule;"
            " 'all-linear' takes every linear layer but the output",
            UserWarning,
            stacklevel=3,
        )


def _split(matrices: list[Target], keys: dict[str, Any]) -> list[tuple[list[Tensor], dict[str, Any]]]:
    """The target matrices in parts that share all keys, in the model's order."""
    mapped = {key: value for key, value in keys.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in keys.items() if key not in mapped}
    names = dict.fromkeys(target.name for target in matrices)
    found = {key: found_names(key, list(value), names, False) for key, value in mapped.items()}
    parts: dict[tuple[Any, ...], tuple[list[Tensor], dict[str, Any]]] = {}
    owned: set[int] = set()
    for name, p, density in matrices:
        if id(p) in owned:  # tied to an earlier one
            continue
        owned.add(id(p))
        matches = {key: next((q for q, those in found[key].items() if name in those), None) for key in mapped}
        own = {key: mapped[key][pattern] for key, pattern in matches.items() if pattern is not None}
        if density is not None:
            own |= {"sparsity": None, "density": density}
        parts.setdefault(tuple(own.items()), ([], {**plain, **own}))[0].append(p)
    return list(parts.values())
