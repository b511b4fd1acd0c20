"""torch.distributed.optim.ZeroRedundancyOptimizer: weights are replicated, each process steps some of them and sends
them to the others, by an optimizer of its own that is given those alone.

What depends on a parameter's place among all, or on the other matrices of its group, needs all of them. The wrapper has
them. Nothing that it passes on says so: it is known by being the one that calls.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def wrapped_group(number: int, own: Sequence[Tensor]) -> dict[str, Any] | None:
    """The group of that number with the parameters of all processes, while a ZeroRedundancyOptimizer builds or extends
    an optimizer of its ``own``; None elsewhere."""
    module: Any = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if module is not None else None
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.ZeroRedundancyOptimizer):
            groups: list[dict[str, Any]] = caller.param_groups[number : number + 1]
            known = {id(p) for group in groups for p in group["params"]}
            return groups[0] if groups and all(id(p) in known for p in own) else None
        frame = frame.f_back
    return None
