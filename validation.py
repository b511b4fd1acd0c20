"""Checks that refuse bad input with one line naming the field, the value and the way out."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any


def require(holds: bool, expectation: str, value: object) -> None:
    """Raise ``ValueError("<expectation>, got <value>")`` unless ``holds``."""
    if not holds:
        raise ValueError(f"{expectation}, got {value!r}")


def nearest(word: object, known: Iterable[str]) -> str:
    """The tail of an error message: the known name that ``word`` was probably meant to be, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def is_real(value: Any) -> bool:
    """A finite number that is not a bool; tensors are refused because reading one would stop the device."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """An int that is not a bool. numpy's are refused: saved in a group, they would not load with weights_only."""
    return isinstance(value, int) and not isinstance(value, bool)
