"""How often a parameter has moved, and what is due then. Counters live on the CPU: reading one stops no device."""

from __future__ import annotations

import torch

from .types import State


def steps_of(state: State) -> int:
    """How often a parameter has moved; during ``update``, this step included."""
    return int(state["step"].item())


def every(period: int, steps: int) -> bool:
    """Whether something that comes at steps 0, T, 2T, ... is due."""
    return steps % int(period) == 0


def since(steps: int, period: int) -> int:
    """Steps since a clock of ``period`` last came round, this one included: 1 to ``period``."""
    return (steps - 1) % period + 1


def with_age(state: State, age: int) -> State:
    """``state`` as a rule sees it whose moments were reset ``age`` steps ago."""
    return {**state, "step": torch.tensor(float(age), device="cpu")}
