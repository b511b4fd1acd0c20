"""The methods by name, for configurations: ``selection: s2ft`` and the fields of its dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from ..validation import nearest
from .hft import HFT
from .method import Groups, Method
from .s2ft import S2FT
from .sara import SaRA

METHODS: Mapping[str, type[Method]] = {"hft": HFT, "s2ft": S2FT, "sara": SaRA}


def selection_method(name: str, **keys: Any) -> Method:
    """A method with its fields, checked.

    Raises:
        ValueError: for a name, a field or a value that there is not.
    """
    if name not in METHODS:
        raise ValueError(f"selection {name!r} is not known; {nearest(name, METHODS)}")
    known = [field.name for field in fields(METHODS[name])]
    for key in keys:
        if key not in known:
            raise ValueError(f"{key} is no field of selection {name}; {nearest(key, known)}")
    return METHODS[name](**keys)


def selection_groups(model: nn.Module, name: str, **keys: Any) -> Groups:
    """Parameter groups of the weights that a method trains; the others of ``model`` are frozen at their values.

    Args:
        model: any transformer with numbered blocks; for ``sara`` any module.
        name: ``hft``, ``s2ft`` or ``sara``.
        keys: the fields of ``HFT``, ``S2FT`` or ``SaRA``.

    Raises:
        ValueError: for a name, a field or a value that there is not, or a model that does not fit.

    Example:
        >>> from torch import nn
        >>> from gracile.optim import SparseAdamW
        >>> from gracile.selections import selection_groups
        >>> model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64))
        >>> optimizer = SparseAdamW(selection_groups(model, "sara", share=0.125), lr=1e-3)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> len(optimizer.state[model[0].weight]["exp_avg"]), model[1].weight.requires_grad
        (512, False)
    """
    return selection_method(name, **keys).groups(model)
