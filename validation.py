"""Checks that refuse bad input with one line naming the field, the value and the way out.

Optimizers declare theirs: a mapping from keys to ``number(">= 1")``, ``whole(1)``, ``one_of("a", "b")`` or ``flag()``.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Callable, Iterable
from typing import Any

Check = Callable[[str, Any], None]  # of a key and its value; raises ValueError


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


# ---- declared checks -------------------------------------------------------------------------------------------------


def number(bounds: str, optional: bool = False) -> Check:
    """A finite number within ``bounds``: ``">= 0"``, ``"> 0"``, ``"< 0"`` or an interval such as ``"in [0, 1)"``."""
    within = _within(bounds)
    return _check(lambda value: is_real(value) and within(value), f"a number {bounds}", optional)


def whole(least: int, most: int | None = None, optional: bool = False) -> Check:
    """A whole number from ``least`` on, to ``most`` where it is given."""
    bounds = f">= {least}" if most is None else f"from {least} to {most}"
    holds = lambda value: is_whole(value) and least <= value and (most is None or value <= most)  # noqa: E731
    return _check(holds, f"a whole number {bounds}", optional)


def one_of(*known: Any, optional: bool = False) -> Check:
    """One of ``known``, which are all of one type."""
    holds = lambda value: value in known and not isinstance(value, bool)  # noqa: E731
    return _check(holds, f"one of {', '.join(map(str, known))}", optional)


def flag() -> Check:
    """True or False."""
    return _check(lambda value: isinstance(value, bool), "True or False", False)


def finite() -> Check:
    """Any finite number."""
    return _check(is_real, "a finite number", False)


def _check(holds: Callable[[Any], bool], expected: str, optional: bool) -> Check:
    sentence = f"{expected} or None" if optional else expected

    def check(key: str, value: Any) -> None:
        require((optional and value is None) or holds(value), f"{key} must be {sentence}", value)

    return check


_COMPARISONS: dict[str, Callable[[Any, float], bool]] = {
    ">=": lambda value, bound: value >= bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    "<": lambda value, bound: value < bound,
}


def _within(bounds: str) -> Callable[[Any], bool]:
    interval = re.fullmatch(r"in ([\[(])(\S+), (\S+)([\])])", bounds)
    if interval:
        opening, low, high, closing = interval.groups()
        above = _COMPARISONS[">=" if opening == "[" else ">"]
        below = _COMPARISONS["<=" if closing == "]" else "<"]
        return lambda value: above(value, float(low)) and below(value, float(high))
    sign, bound = bounds.split()
    return lambda value: _COMPARISONS[sign](value, float(bound))
