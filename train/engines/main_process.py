"""What the first process of a launch finds out for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from transformers import TrainingArguments

from ..errors import BadInput

T = TypeVar("T")


def on_main(run: TrainingArguments, find: Callable[[], T]) -> T:
    """What ``find`` returns on the first process, on each: no two may see files differently. Collective.

    Raises:
        BadInput: on every process, where ``find`` does.
    """
    if run.world_size == 1:
        return find()
    told: list[T | str | None] = [None, None]
    if run.process_index == 0:
        try:
            told[0] = find()
        except BadInput as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise BadInput(str(told[1]))
    found: T = told[0]  # type: ignore[assignment]
    return found
