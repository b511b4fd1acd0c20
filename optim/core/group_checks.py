"""What every parameter group is checked for, before an optimizer takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...int8_weight import is_int8
from ...validation import Check, flag, number, require, whole
from .types import Group

# Keys of which one marks the groups of matrices that a method is for; other groups get the plain rule.
MATRIX_KEYS = ("rank", "sparsity", "density", "n", "keep", "role")


def _floating_dtype(key: str, dtype: object) -> None:
    floating = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    require(floating, f"{key} must be a floating point torch.dtype or None", dtype)


COMMON_CHECKS: dict[str, Check] = {
    "weight_decay": number(">= 0"),
    "state_dtype": _floating_dtype,
    "maximize": flag(),
    "capturable": flag(),
    "stochastic_rounding": flag(),
    "rounding_seed": whole(0),
}


def check_declared(group: Group, checks: Mapping[str, Check]) -> None:
    """Refuse values that declared checks refuse."""
    for key, check in checks.items():
        if key in group:
            check(key, group[key])


def parameters_in(group: Group) -> list[Tensor]:
    """The parameters of a group, named ones too; what is no tensor is torch's to refuse."""
    entries: Iterable[object] = (entry[1] if isinstance(entry, tuple) else entry for entry in group["params"])
    return [p for p in entries if isinstance(p, Tensor)]


def check_contiguous(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters whose places in memory are not those of their elements in a row."""
    for p in parameters:
        if not p.is_contiguous():
            shape = tuple(p.shape)
            raise ValueError(f"a parameter of shape {shape} is not contiguous; a mask counts its places in memory")


def check_tensors(parameters: list[Tensor]) -> None:
    """Refuse parameters that come twice, or of a dtype that no optimizer here trains."""
    once = len({id(p) for p in parameters}) == len(parameters)
    require(once, "params must hold each parameter once", len(parameters))
    for p in parameters:
        require(p.is_floating_point(), "parameters must be real floating point tensors", p.dtype)


def check_rounding(parameters: list[Tensor], group: Group) -> None:
    """Refuse what would be rounded to nearest all the same."""
    if group.get("stochastic_rounding"):
        for p in parameters:
            fits = p.dtype != torch.float16 or is_int8(p)
            require(fits, "stochastic_rounding=True is for bfloat16 and wider parameters", p.dtype)


def check_none_in_8_bits(parameters: list[Tensor], name: str) -> None:
    """Refuse weights in 8 bits, for a class ``name`` that reads or writes weights by itself."""
    for p in parameters:
        if is_int8(p):
            raise ValueError(
                f"{name} does not move weights in 8 bits, got one of shape {tuple(p.shape)}; leave quantize_weights "
                "away, or take a class that does, such as GaLoreAdamW"
            )
