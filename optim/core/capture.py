"""``capturable``: an ordinary step that a CUDA graph can replay.

A replay runs the kernels of the step that was captured, with the arguments that they had. So counters live on the
device and count there, and what follows from them, and from a learning rate that is a tensor, is computed there. The
host knows the counters from the last step that it took itself: it decides by them which subspace is due, and a step in
which one is due cannot be captured. A step that is not captured reads them, all at once, and sees what was replayed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from ..distributed import FullShard, UnsupportedLayout
from .clock import steps_of
from .declared_state import DeclaredState
from .rules import plain, with_numbers
from .types import Group, ParamStep, State, WithClock

NEVER = sys.maxsize  # steps until a refresh, where nothing is refreshed
REMEDY = "take a step outside of the graph, then capture and replay"


def is_capturing() -> bool:
    """Whether kernels are being captured and not run."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def read_counters(states: Mapping[Tensor, State]) -> dict[Tensor, int]:
    """How often each parameter has moved: one read of the device for all."""
    held = {p: state["step"] for p, state in states.items() if "step" in state}
    if not held:
        return {}
    device = next(iter(held.values())).device
    counts = torch.stack([step.to(device) for step in held.values()]).tolist()
    return {p: int(count) for p, count in zip(held, counts, strict=True)}


def host_clock(steps: int) -> Tensor:
    return torch.tensor(float(steps), device="cpu")


def count_on_device(work: Sequence[ParamStep]) -> None:
    """One step more, of each parameter, experts in one tensor once."""
    counters = {id(item.counter): item.counter for item in work if item.counter is not None}
    if counters:
        torch._foreach_add_(list(counters.values()), 1)


def numbers_of_group(group: Group) -> Group:
    """A group as a step reads it: its learning rate and betas as numbers, but for a rate that a graph reads anew."""
    lr = group["lr"]
    if not (group["capturable"] and isinstance(lr, Tensor)):
        return with_numbers(group)
    if any(lr.device == p.device for p in group["params"]):
        return {**with_numbers({**group, "lr": 0.0}), "lr": lr}
    if is_capturing():
        raise RuntimeError(
            f"lr is a tensor on {lr.device}, and a graph would keep the number that it has now; put it where the "
            "parameters are"
        )
    return with_numbers(group)


class CapturableStep(DeclaredState):
    """An optimizer whose step may be captured.

    Attributes:
        captures: whether an ordinary step is arithmetic on the device alone, of numbers as in ``optim/numbers.py``.
    """

    captures: ClassVar[bool] = False
    _counted: Mapping[Tensor, int] = MappingProxyType({})  # steps by parameter, as of the last that was not captured
    _clocks: Mapping[Tensor, Tensor] = MappingProxyType({})  # the same, in the course of a step

    # ---- what a method says -----------------------------------------------------------------------------------------

    def why_not_captured(self, group: Group) -> str | None:
        """Why an ordinary step of a group cannot be replayed; None where it can."""
        return None if self.captures else "its step asks the host, or changes what there is to replay"

    def ordinary_steps(self, item: ParamStep) -> int:
        """How many steps of a parameter come before one that is no ordinary one; 0 where the next is none."""
        return NEVER

    # ---- for a loop of training -------------------------------------------------------------------------------------

    @torch.no_grad()
    def steps_until_refresh(self) -> int:
        """How many ordinary steps come before one that finds a subspace: with ``capturable``, how many may be replayed.

        0 where the next step must not be captured, ``sys.maxsize`` where none after it will be. It knows of replays: it
        reads the counters that are on a device, once.

        Example:
            >>> from torch import nn
            >>> from gracile.optim import GaLoreAdamW
            >>> weight = nn.Parameter(torch.zeros(8, 4))
            >>> optimizer = GaLoreAdamW([{"params": [weight], "rank": 2}], update_proj_gap=200)
            >>> optimizer.steps_until_refresh()
            0
            >>> weight.grad = torch.randn(8, 4)
            >>> optimizer.step()
            >>> optimizer.steps_until_refresh()
            199
        """
        counts = read_counters(self._states_on_device())
        fewest = NEVER
        for group, tensors in self.stepped_parameters():
            keys = {**self.later_keys, **group}
            for p in [p for p in tensors if p.requires_grad]:
                for _, shard, held in self.shards_of(p, group):
                    if "step" not in held:
                        return 0
                    state = WithClock(held, host_clock(counts[p])) if p in counts else held
                    parts = self.matrices_of(shard, keys, state)
                    fewest = min([fewest, *(self.ordinary_steps(ParamStep(part, keys, its)) for part, its in parts)])
        return fewest

    # ---- in a step --------------------------------------------------------------------------------------------------

    def check_capturable(self, group: Group) -> None:
        """Refuse a group whose steps cannot be captured."""
        if (reason := self.why_not_captured(group)) is not None:
            raise ValueError(f"capturable must be False for {type(self).__name__}, got True: {reason}")
        for beta in group.get("betas", ()):
            if isinstance(beta, Tensor):
                raise ValueError(f"betas must be numbers where capturable=True, got the tensor {plain(beta)}")

    def look_at_counters(self) -> None:
        """What the host knows of the counters on the device: all of it, but while kernels are captured."""
        self._clocks = {}
        if not is_capturing():
            self._counted = read_counters(self._states_on_device())
            return
        for group in self.param_groups:
            if not group["capturable"]:
                raise RuntimeError("a step is captured in a CUDA graph, which needs capturable=True in every group")
            if any(p.grad is not None and p not in self._counted for p in group["params"]):
                raise RuntimeError(f"the first step of a parameter, or the first after a load, is captured; {REMEDY}")

    def with_host_clock(self, p: Tensor, shard: FullShard, group: Group, state: State) -> tuple[State, Tensor | None]:
        """A state whose counter the host may ask, and the counter that is on the device."""
        if not group["capturable"]:
            return state, None
        if shard.split:
            raise UnsupportedLayout(
                "capturable must be False where parameters are split over processes, as parameter "
                f"{shard.position} is: its step sends messages"
            )
        clock = host_clock(self._counted.get(p, 0))
        self._clocks = {**self._clocks, p: clock}
        return WithClock(state, clock), state["step"]

    def check_captured(self, work: Sequence[ParamStep]) -> None:
        """Refuse to capture a step that is no ordinary one."""
        due = [item.shard for item in work if self.ordinary_steps(item) == 0] if is_capturing() else []
        if due:
            raise RuntimeError(
                f"parameter {due[0].position}, of shape {due[0].shape}, is due for what no graph can replay, as a new "
                f"subspace, in the step that is captured; {REMEDY}, as many steps as steps_until_refresh() says"
            )

    def note_counts(self) -> None:
        if not is_capturing():
            self._counted = {p: steps_of({"step": clock}) for p, clock in self._clocks.items()}

    def forget(self) -> None:
        super().forget()
        self._counted = {}

    def _states_on_device(self) -> dict[Tensor, State]:
        held = [p for group in self.param_groups if group["capturable"] for p in group["params"] if p in self.state]
        return {p: self.state[p] for p in held}
