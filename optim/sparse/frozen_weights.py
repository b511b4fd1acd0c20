"""Weights outside of a mask that keep their values, to the bit: what is trained is a part of a dense matrix.

    M       which weights are trained: a Selection, or a first mask as of any sparse training
    W[M] <- AdamW(G[M])         the decay too is of W[M] alone, towards zero or towards what W[M] was at first
    every reselect_every steps: M is chosen anew by the weights as they are, and the state begins anew   (SaRA)

A weight that a mask takes in starts from the value that it has, with moments of zero; one that is dropped stays where
it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...validation import Check, one_of, require, whole
from ..core.clock import every, steps_of
from ..core.group_checks import parameters_in
from ..core.types import Group, State
from ..distributed import FullShard, full_shape
from ..numbers import decay_of, is_zero, scaled
from ..state.spec import Coordinates, StateSpec, wide_dtype
from .mask_state import Packed
from .selected import Below, Selection

START = "start"  # what the weights of a mask were when it took them in
KEYS: Mapping[str, Any] = {"outside": "zero", "selected": None, "decay_to": "zero", "reselect_every": None}
CHECKS: Mapping[str, Check] = {
    "outside": one_of("zero", "frozen"),
    "decay_to": one_of("zero", "start"),
    "reselect_every": whole(1, optional=True),
}


@dataclass(frozen=True)
class Chosen:
    """A parameter's selection, and how many weights it had when the optimizer was built."""

    selection: Selection
    count: int


def is_frozen_outside(group: Mapping[str, Any]) -> bool:
    """Whether weights outside of a group's masks keep their values."""
    return group.get("outside") == "frozen"


def check_outside(keys: Mapping[str, Any]) -> None:
    """Refuse what does not go together in a group with masks."""
    frozen, every_so_often = is_frozen_outside(keys), keys.get("reselect_every")
    for key, value in (("init", "smallest"), ("decay_to", "start")):
        require(
            frozen or keys.get(key) != value, f"{key}={value!r} is for outside='frozen'", keys.get("outside", "zero")
        )
    require(frozen or every_so_often is None, "reselect_every is for outside='frozen'", keys.get("outside", "zero"))
    for key in ("rescale_init", "reinit_when_same"):
        require(not (frozen and keys.get(key)), f"{key} changes weights; it must be False with outside='frozen'", True)
    if every_so_often is None:
        return
    require(not keys.get("capturable"), "reselect_every must be None with capturable=True", every_so_often)
    require(keys["drop_fraction"] == 0, "drop_fraction must be 0 with reselect_every", keys["drop_fraction"])
    by_weights = keys["init"] in ("smallest", "magnitude")
    require(by_weights, "init must be 'smallest' or 'magnitude' with reselect_every", keys["init"])


def take_selections(group: Group, defaults: Group) -> tuple[Group, dict[int, Chosen]]:
    """A group without its ``selected``, but with the density that this makes; and what it was, by the parameters' ids.

    Raises:
        ValueError: for what is no selection, does not fit a parameter, or is missing for one.
    """
    keys = {**defaults, **group}
    selected = keys.get("selected")
    if selected is None:
        return group, {}
    require(is_frozen_outside(keys), "selected is for outside='frozen'", keys.get("outside"))
    for key in ("sparsity", "density", "initial_sparsity"):
        require(keys[key] is None, f"selected says how many weights there are; {key} must be None", keys[key])
    require(
        keys["drop_fraction"] == 0, "drop_fraction must be 0 with selected, which does not move", keys["drop_fraction"]
    )
    require(keys["structure"] == "unstructured", "structure must be 'unstructured' with selected", keys["structure"])
    group = {**group, "params": _listed(group["params"])}
    found, size = {}, 0
    for p in parameters_in(group):
        own = selected if isinstance(selected, Selection) else _of(selected, p)
        own.check_shape(full_shape(p))
        again = keys.get("reselect_every") is None or isinstance(own, Below)
        require(again, "reselect_every is for selections by size (Below)", type(own).__name__)
        found[id(p)] = Chosen(own, own.count(p))
        size += math.prod(full_shape(p))
    share = sum(own.count for own in found.values()) / max(1, size)
    # by magnitude, so that weights decide when masks are made anew
    return {**group, "selected": None, "density": share, "init": "smallest"}, found


def _listed(params: Any) -> Any:
    return [params] if isinstance(params, Tensor) else params if isinstance(params, set) else list(params)


def _of(selected: Any, p: Tensor) -> Selection:
    shape = full_shape(p)
    require(
        isinstance(selected, Mapping), "selected must be a Selection, or a mapping from parameters to them", selected
    )
    require(p in selected, "selected has nothing for a parameter; put it into another group", shape)
    require(isinstance(selected[p], Selection), "selected must map parameters to Selections", selected[p])
    own: Selection = selected[p]
    return own


# ---- a step ----------------------------------------------------------------------------------------------------------


def start_spec(by_element: Coordinates, shard: FullShard, codec: Packed) -> StateSpec:
    return by_element.spec(START, wide_dtype(shard)).stored_by(codec)


def decay_(shard: FullShard, group: Group, state: State) -> Group:
    """The weights of a mask decay; the group as it is for a step that is left without decay."""
    decay = decay_of(group)
    if is_zero(decay):
        return group
    undecayed = {**group, "weight_decay": 0.0}
    flat, at = shard.parameter.view(-1), state["indices"]
    if START not in state and len(at) == len(flat):
        flat.mul_(1 - decay)
        return undecayed
    held = flat.index_select(0, at)
    if START in state:
        held.sub_(state[START])
    held, factor = scaled(held, -decay)
    flat.index_add_(0, at, held, alpha=factor)
    return undecayed


def is_reselected(group: Mapping[str, Any], state: State) -> bool:
    """Whether masks are chosen anew after the step that a matrix's counter has counted."""
    period = group.get("reselect_every")
    return period is not None and every(period, steps_of(state))
