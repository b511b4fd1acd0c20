"""The keys of a masked group: what may be in them, and what they say about how many weights stay and when masks change.

Functions of a group's keys together with those that a method has chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from ...validation import is_real, is_whole, require
from ..core.clock import steps_of
from ..core.types import State
from .experts import are_transposed, as_matrix, matrices_in, shape_of_each
from .frozen_weights import check_outside
from .grown_weights import GROWN_STEPS
from .layer_budgets import BY_WEIGHT, DISTRIBUTIONS, budgets
from .masks import DROPS, GROWS, Structure, Unstructured
from .structured_masks import Blocks, ConstantFanIn

Keys = dict[str, Any]

STRUCTURES: dict[str, Structure] = {
    "unstructured": Unstructured(),
    "constant_fan_in": ConstantFanIn(),
    "block": Blocks(),
}
OF_STRUCTURE = {"gamma_sal": ("constant_fan_in", 0.3), "block_size": ("block", 64)}  # keys, whose, and their defaults
# what is left of the drop fraction when a share of the time to t_end is over
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "cubic": lambda share: (1 - share) ** 3,
}
INITS = ("random", "magnitude", "smallest")


def with_defaults(keys: Keys) -> Keys:
    """Those that are left to the structure and the distribution have their values."""
    chosen = dict(keys)
    for key, (_, default) in OF_STRUCTURE.items():
        chosen[key] = default if chosen.get(key) is None else chosen[key]
    chosen["init"] = chosen["init"] or ("magnitude" if chosen["distribution"] in BY_WEIGHT else "random")
    return chosen


def check_masks(keys: Keys) -> None:
    """Refuse bad values of a masked group's keys."""
    sparsity, density = keys["sparsity"], keys["density"]
    require(sparsity is None or density is None, "sparsity and density say the same; give one", (sparsity, density))
    for key in ("sparsity", "density", "initial_sparsity"):
        value = keys[key]
        require(value is None or (is_real(value) and 0 <= value <= 1), f"{key} must be a number in [0, 1]", value)
    for key, known in {
        "drop": DROPS,
        "grow": GROWS,
        "structure": tuple(STRUCTURES),
        "distribution": DISTRIBUTIONS,
        "schedule": tuple(SCHEDULES),
        "init": (*INITS, None),
        "grown_step": GROWN_STEPS,
    }.items():
        require(keys[key] in known, f"{key} must be one of {', '.join(map(str, known))}", keys[key])
    _check_clock(keys)
    for key, (structure, _) in OF_STRUCTURE.items():
        if keys.get(key) is not None and keys["structure"] != structure:
            raise ValueError(f"{key}={keys[key]!r} is for structure={structure!r}, got {keys['structure']!r}")
    if keys["distribution"] in BY_WEIGHT:
        unfit = keys["structure"] != "unstructured" or keys["initial_sparsity"] is not None
        require(
            not unfit and keys["init"] in (None, "magnitude"),
            "lamp and global rank weights; they go with "
            "structure='unstructured', init='magnitude' and no initial_sparsity",
            keys["distribution"],
        )
    weight = keys["drop_lambda"]
    require(is_real(weight) and weight >= 0, "drop_lambda must be a number >= 0", weight)
    require(is_whole(keys["seed"]) and keys["seed"] >= 0, "seed must be a whole number >= 0", keys["seed"])
    warmup = keys["grown_warmup"]
    require(is_whole(warmup) and warmup >= 0, "grown_warmup must be a whole number >= 0", warmup)
    require(not warmup or keys["grown_step"] == "own", "grown_warmup must be 0 unless grown_step='own'", warmup)
    for key in ("reinit_when_same", "rescale_init", "transposed_experts"):
        require(isinstance(keys.get(key, False), bool), f"{key} must be True or False", keys.get(key))
    if are_transposed(keys) and keys["structure"] != "constant_fan_in":
        raise ValueError(f"transposed_experts=True is for structure='constant_fan_in', got {keys['structure']!r}")
    check_outside(keys)
    STRUCTURES[keys["structure"]].check(with_defaults(keys))


def _check_clock(keys: Keys) -> None:
    fraction, every, begin, end = (keys[key] for key in ("drop_fraction", "update_every", "t_begin", "t_end"))
    require(is_real(fraction) and 0 <= fraction <= 1, "drop_fraction must be a number in [0, 1]", fraction)
    require(is_whole(every) and every >= 1, "update_every must be a whole number >= 1", every)
    require(is_whole(begin) and begin >= 0, "t_begin must be a whole number >= 0", begin)
    require(end is None or (is_whole(end) and end > begin), "t_end must be a whole number > t_begin or None", end)
    falls = (keys["schedule"] != "constant" and fraction > 0) or keys["initial_sparsity"] is not None
    require(
        end is not None or not falls,
        f"t_end must be the step of the last change of masks (three quarters of the run, as RigL has it) with "
        f"schedule={keys['schedule']!r} and initial_sparsity={keys['initial_sparsity']!r}",
        end,
    )


# ---- how many, and when ----------------------------------------------------------------------------------------------


def density_of(group: Keys) -> float | None:
    if group["density"] is not None:
        return float(group["density"])
    return None if group["sparsity"] is None else 1 - float(group["sparsity"])


def _share(step: int, keys: Keys) -> float:
    """How much of the time from ``t_begin`` to ``t_end`` is over."""
    if keys["t_end"] is None:
        return 0.0
    share = (step - keys["t_begin"]) / (keys["t_end"] - keys["t_begin"])
    return float(min(1.0, max(0.0, share)))


def density_at(step: int | None, keys: Keys) -> float:
    """The share of a group's weights that is in the masks after ``step`` steps, in the end for None: with
    ``initial_sparsity`` it falls by a cubic to its last value (Zhu & Gupta 2017, arXiv:1710.01878)."""
    last = density_of(keys)
    assert last is not None
    if keys["initial_sparsity"] is None or step is None:
        return last
    first = 1 - float(keys["initial_sparsity"])
    return last + (first - last) * (1 - _share(step, keys)) ** 3


def counts_after(step: int | None, shapes: Sequence[tuple[int, ...]], keys: Keys) -> list[list[int]]:
    """How many units of each matrix stay after ``step`` steps, for each of a group's parameters. Of ``BY_SHAPE``."""
    structure = STRUCTURES[keys["structure"]]
    units = tuple(structure.units(as_matrix(shape), keys) for shape in shapes)
    return _counts(units, tuple(shapes), density_at(step, keys), keys["distribution"])


@lru_cache(maxsize=16)  # every parameter of a plan asks, and a model of experts has ten thousands of matrices
def _counts(
    units: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], density: float, distribution: str
) -> list[list[int]]:
    each = [
        (own, shape_of_each(shape)) for own, shape in zip(units, shapes, strict=True) for _ in range(matrices_in(shape))
    ]
    counts = iter(budgets([own for own, _ in each], [shape for _, shape in each], density, distribution))
    return [[next(counts) for _ in range(matrices_in(shape))] for shape in shapes]


def is_due(state: State, keys: Keys) -> bool:
    """Whether a matrix's mask changes after the step that its counter has counted."""
    step, begin, end = steps_of(state), keys["t_begin"], keys["t_end"]
    if keys["initial_sparsity"] is not None and step == end:
        return True  # the last of the ramp
    moves = keys["drop_fraction"] > 0 or keys["initial_sparsity"] is not None
    return moves and begin < step and (end is None or step < end) and step % keys["update_every"] == 0


def drop_fraction_at(step: int, keys: Keys) -> float:
    return float(keys["drop_fraction"]) * SCHEDULES[keys["schedule"]](_share(step, keys))
