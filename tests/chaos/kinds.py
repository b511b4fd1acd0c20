"""What can happen to a run, and when; and what must hold."""

from __future__ import annotations

from pathlib import Path

from gracile.train.run import checkpoints
from gracile.train.run.contents import AsksForCode

KILL, TERM, INT, FULL, RANK, SECOND = "SIGKILL", "SIGTERM", "SIGINT", "full disk", "one rank killed", "second process"
TRUNCATED, FLIPPED, POISONED, NONE_LEFT = "truncated", "flipped", "poisoned", "all damaged"
ENDS, OTHERS = (KILL, TERM, INT, FULL, RANK), (TRUNCATED, FLIPPED, POISONED, SECOND)
KINDS = (*ENDS, *OTHERS, NONE_LEFT)
STARTING, TRAINING, SAVING = "starting", "training", "saving"


class Unexpected(Exception):
    """A command did what it should not."""


def demand(holds: object, *words: object) -> None:
    if not holds:
        raise Unexpected(" ".join(map(str, words)))


def sound(checkpoint: Path) -> bool:
    try:
        return checkpoints.fault(checkpoint) is None
    except AsksForCode:
        return False
