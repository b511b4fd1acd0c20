"""What a start that was struck must say, and how it must end."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from chaos.kinds import FULL, KILL, RANK, STARTING, TERM, demand, sound
from chaos.layouts import Layout
from chaos.starts import Pooled, Start

from gracile.train.run import checkpoints


class Answer:
    """What a start that was struck has said and how it ended, and what it should have."""

    def __init__(self, run: Path, layout: Layout, start: Start, codes: list[int], moment: str, steps: int) -> None:
        self.run, self.start, self.codes, self.moment, self.steps = run, start, codes, moment, steps
        self.lines, self.pooled, self.ranks = start.lines(), isinstance(start, Pooled), layout.ranks

    def to(self, kind: str, victim: int | None) -> None:
        for line in self.lines:
            named = re.search(r"(\S+) is whole", line)
            demand(named is None or sound(Path(named[1])), "it is not whole:", line)
            demand(
                "no checkpoint had been saved" not in line or not any(map(sound, checkpoints.checkpoints(self.run))),
                "there are some:",
                line,
            )
        if kind == KILL:
            self._codes({-signal.SIGKILL})
        elif kind == FULL:
            self._full()
        elif kind == RANK:
            self._lost(victim)
        else:
            self._stopped(kind, signal.Signals[kind])

    def _codes(self, allowed: set[int]) -> None:
        if self.pooled or self.ranks == 1:
            demand(set(self.codes) <= allowed, "exit codes", self.codes, "not", allowed, self.start.output()[-3000:])
        elif self.moment != STARTING:  # launchers have codes of their own
            demand(self.codes != [0], "the launcher ended with 0", self.start.output()[-3000:])

    def _full(self) -> None:
        self._codes({1, 2} if self.moment == STARTING else {1})
        words = ("No space left", "is the disk full?", "another process of the run")
        demand(self.lines and all(any(word in line for word in words) for line in self.lines), "it said", self.lines)
        demand(any(word in line for line in self.lines for word in words[:2]), "nobody names the disk:", self.lines)

    def _lost(self, victim: int | None) -> None:
        """The other ranks notice within seconds."""
        if self.pooled:
            others = [code for rank, code in enumerate(self.codes) if rank != victim]
            demand(self.codes[victim or 0] == -signal.SIGKILL and set(others) == {1}, "exit codes", self.codes,
                   self.start.output()[-3000:])  # fmt: skip
            demand(len(self.lines) == len(others), "it said", self.lines)
        else:
            demand(self.codes != [0], "the launcher ended with 0")

    def _stopped(self, name: str, number: int) -> None:
        if self.moment == STARTING:
            # a rank that is struck before it listens dies of it; one whose neighbours have gone says that
            self._codes({128 + number, -signal.SIGTERM, 1} if name == TERM else {128 + number, 1})
            return
        # after the last step a rank that has nothing left to do may have ended before
        self._codes({128 + number, 0} if self._newest() >= self.steps else {128 + number})
        demand(len(self.lines) == 1 and f"stopped by {name}" in self.lines[0], "it said", self.lines)
        step = re.search(r"after step (\d+); ", self.lines[0])
        demand(step or self._newest() >= self.steps, "no step:", self.lines[0])
        saved = self.run / f"checkpoint-{step[1] if step else self._newest()}"
        demand(sound(saved) and f"{saved} is whole" in self.lines[0], saved.name, "is not whole:", self.lines[0])

    def _newest(self) -> int:
        return max((checkpoints.number(c) for c in checkpoints.checkpoints(self.run)), default=0)
