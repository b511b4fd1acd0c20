"""Runs that suffer one fault after the other until they are through, and must be the undisturbed run to the bit."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from chaos.answers import Answer
from chaos.damage import RUN_FILE, Damage, inflict
from chaos.disk import Disk
from chaos.kinds import (
    ENDS,
    FULL,
    KILL,
    NONE_LEFT,
    OTHERS,
    RANK,
    SAVING,
    SECOND,
    STARTING,
    TRAINING,
    demand,
    sound,
)  # fmt: skip
from chaos.layouts import KEPT, SAVE_STEPS, Layout, found_by
from chaos.starts import Launched, Pooled, Start
from helpers import same
from pool import Pool

from gracile.train.run import checkpoints, history
from gracile.train.run.lock import LOCK

LAUNCH_EVERY = 5  # every fifth start is a launcher's


class Disturbed:
    """Of one layout; ``suffer`` until so many faults have come, and compare."""

    def __init__(
        self, layout: Layout, pool: Pool, config: Path, folder: Path, moments: random.Random, disk: Disk | None = None
    ) -> None:
        self.layout, self.pool, self.config, self.folder = layout, pool, config, folder
        self.moments, self.disk = moments, disk
        self.mark, self.log = folder / "mark", folder / "log.txt"
        self.run = folder / "run-0"
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.launches = True
        self._starts = self._rounds = 0
        self._ends = self._bag([kind for kind in ENDS if self._possible(kind)])
        self._others = self._bag(OTHERS)
        self._moments = self._bag((STARTING, TRAINING, SAVING, TRAINING, SAVING))
        self._other: str | None = None  # drawn, and not yet possible

    def _possible(self, kind: str) -> bool:
        return not ((kind == RANK and self.layout.ranks == 1) or (kind == FULL and self.disk is None))

    def _bag(self, kinds: tuple[str, ...] | list[str]) -> Iterator[str]:
        """Each of them once, in any order, and again."""
        while True:
            yield from self.moments.sample(kinds, len(kinds))

    # ---- a run from its begin to its end ----------------------------------------------------------------------------

    def undisturbed(self) -> None:
        begin = time.monotonic()
        start = self._start(self.folder / "whole")
        demand(start.wait(300) == [0] * self.layout.ranks, start.output()[-3000:])
        self.seconds = time.monotonic() - begin
        self.truth = found_by(self.folder / "whole")
        self.steps = self.truth["losses"][-1]["step"]
        shutil.rmtree(self.folder / "whole")

    def suffer(self, faults: int) -> None:
        """Runs with faults, one after the other, until there were enough."""
        self.undisturbed()
        print(f"{self.layout.name}: {self.steps} steps undisturbed, {self.seconds:.0f} s", flush=True)
        while self.counts.total() < faults and len(self.failures) < 3:
            self._rounds += 1
            self.run = self.folder / f"run-{self._rounds}"
            try:
                self._through(faults)
            except (
                Exception
            ) as error:  # also one of the checks themselves: the other layouts are looked at all the same
                self.failures.append(f"{self.layout.name}: {type(error).__name__}: {str(error)[:3500]}")
                print(f"FAILED: {self.failures[-1]}", flush=True)
            if self.disk is not None:
                self.disk.empty()
            shutil.rmtree(self.run, ignore_errors=True)

    def _through(self, faults: int) -> None:
        while not self._start_and_fault(faults):
            pass
        found = found_by(self.run)
        for what in ("losses", "validation loss"):
            demand(found[what] == self.truth[what], "other", what, "than undisturbed")
        demand(same(found["weights"], self.truth["weights"]), "other weights than undisturbed")
        for name in ("loss.png", "config.json", "tokenizer.json", RUN_FILE, history.HISTORY_FILE):
            demand((self.run / name).is_file(), name, "is missing at the end")
        demand(not (self.run / LOCK).exists(), "the lock is left")
        print(f"{self.layout.name}: run {self._rounds} is through, every loss and weight as undisturbed", flush=True)
        if self.counts[NONE_LEFT] == 0:
            self._all_damaged()

    def _start_and_fault(self, faults: int) -> bool:
        """One start of the run, and whether it came to the end."""
        before = self._whole()
        damage = self._damage(before) if self.counts.total() < faults else None
        expected = next(
            (c for c in before if damage is None or c != damage.checkpoint or damage.answer == "taken"), None
        )
        start = self._start(self.run, "--resume_from_checkpoint", "auto")
        try:
            if damage is not None and damage.answer in ("refused", "either") and self._refused(start, damage):
                return False
            ended = self._fault(start, faults)
        finally:
            start.kill()
        if damage is not None and damage.answer != "refused":
            self._skipped(start, damage, expected)
        said = re.search(r"^continuing from (\S+?),?(?: |$)", start.output(), re.MULTILINE)
        demand(said is None or said[1] == str(expected), "it went on from", said and said[1], "not from", expected)
        self._nothing_lost([c for c in before if damage is None or c != damage.checkpoint])
        return ended

    def _start(self, run: Path, *more: str) -> Start:
        arguments = [str(self.config), "--output_dir", str(run), *self.layout.engine, *more]
        self._starts += 1
        if self.launches and self._starts % LAUNCH_EVERY == 0:
            without = [str(self.config), "--output_dir", str(run), *more]  # the launcher adds the engine
            return Launched(self.layout, run, without, self.log)
        return Pooled(self.pool, self.layout, run, arguments)

    def _whole(self) -> list[Path]:
        """The whole checkpoints, newest first."""
        return [c for c in checkpoints.checkpoints(self.run) if sound(c)] if self.run.exists() else []

    def _newest(self) -> int:
        sealed = [c for c in checkpoints.checkpoints(self.run) if checkpoints.is_sealed(c)] if self.run.exists() else []
        return checkpoints.number(sealed[0]) if sealed else 0

    # ---- files ------------------------------------------------------------------------------------------------------

    def _draw_other(self) -> str:
        kind = self._other or next(self._others)
        self._other = None
        return kind

    def _damage(self, whole: list[Path]) -> Damage | None:
        """Of a file of the newest whole checkpoint, where there is another."""
        if self.moments.random() < 0.2:
            return None
        kind = self._draw_other()
        if kind == SECOND or len(whole) < 2:
            self._other = kind
            return None
        self.saved_run_file = (self.run / RUN_FILE).read_bytes()
        return inflict(kind, self.run, whole[0], self.moments, self.mark)

    def _refused(self, start: Start, damage: Damage) -> bool:
        """Whether the run says in one line that it does not start; what the line asks for is done then."""
        if damage.answer == "either":
            self._until(lambda: start.ended() or "validation blocks of" in start.output(), start)
            if not start.ended():
                return False
        codes, lines = start.wait(), start.lines()
        demand(
            set(codes) <= {2} or isinstance(start, Launched), "exit codes", codes, "for", damage, start.output()[-900:]
        )
        demand(len(lines) == 1, "lines for", damage, lines, start.output()[-900:])
        demand(
            damage.file.name in lines[0] or "the data is not that" in lines[0] or " but the run in " in lines[0], lines
        )
        self._clean(start)
        if damage.checkpoint is None:
            damage.file.write_bytes(self.saved_run_file)
        else:
            shutil.rmtree(damage.checkpoint)
        self._count(damage.kind, f"{damage}: refused", lines[0])
        return True

    def _skipped(self, start: Start, damage: Damage, expected: Path | None) -> None:
        """It went on, and the line that names the damaged checkpoint was said; if it came so far."""
        output = start.output()
        if "validation blocks of" not in output:
            return  # what is to be counted is what was seen
        answer = f"{damage}: went on from {expected and expected.name}"
        if damage.answer == "skipped":
            assert damage.checkpoint is not None
            (line,) = re.findall(rf"^skipping {re.escape(str(damage.checkpoint))}: .*$", output, re.MULTILINE) or [""]
            named = damage.file.name == checkpoints.MANIFEST or damage.file.name in line
            demand(line and named, "nothing said of", damage, output[-900:])
            answer += f" after {line.partition(': ')[2]!r}"
        self._count(damage.kind, answer)

    def _all_damaged(self) -> None:
        """A copy of the run, without a whole checkpoint, is refused in one line."""
        run, self.run = self.run, self.folder / "copy"
        shutil.copytree(run, self.run)
        for checkpoint in checkpoints.checkpoints(self.run):
            inside = self.moments.choice(("model.safetensors", "scheduler.pt", "trainer_state.json"))
            (checkpoint / inside).write_bytes(b"")
        start = Pooled(self.pool, self.layout, self.run, [str(self.config), "--output_dir", str(self.run),
                       *self.layout.engine, "--resume_from_checkpoint", "true"])  # fmt: skip
        codes, lines = start.wait(), start.lines()
        demand(set(codes) == {2} and len(lines) == 1 and "no whole checkpoint" in lines[0], codes, lines)
        self._clean(start)
        self._count(NONE_LEFT, "refused", lines[0])
        shutil.rmtree(self.run)
        self.run = run

    # ---- what happens to a process ----------------------------------------------------------------------------------

    def _fault(self, start: Start, faults: int) -> bool:
        """Let it run, with a fault at some moment; whether it came to the end."""
        if self._other == SECOND and self.counts.total() < faults:
            self._second(start)
        if self.counts.total() >= faults or start.ended():
            codes = start.wait(300)
            demand(set(codes) == {0}, "exit codes", codes, start.output()[-3000:])
            return True
        kind, moment = next(self._ends), next(self._moments)
        if kind == RANK and moment == STARTING:
            moment = TRAINING  # before the processes know each other they wait for one another, and launchers end that
        if not self._reach(moment, start):
            return self._fault(start, 0)  # too late
        victim = self._strike(kind, start)
        codes = start.wait(40)
        if self.disk is not None:
            self.disk.empty()
        if set(codes) == {0} and (self.run / "metrics.json").exists():
            return True  # it was through before
        self._clean(start)
        Answer(self.run, self.layout, start, codes, moment, self.steps).to(kind, victim)
        lines = start.lines()
        self._count(kind, f"{moment} ({start.name}), newest checkpoint {self._newest()}", lines[0] if lines else "")
        return False

    def _reach(self, moment: str, start: Start) -> bool:
        """Wait for it; False if the run has come to its end before."""
        self._until(lambda: start.began() or start.ended(), start)
        if moment == STARTING:
            self._sleep(0, 2.5 if isinstance(start, Pooled) else 12)
            return not start.ended()
        self._until(lambda: "validation blocks of" in start.output() or start.ended(), start)
        # the folder may have newer ones, damaged, of which the next save is one
        goal = self._newest() + self.moments.choice((1, 2, 3)) * SAVE_STEPS
        first = {c: c.stat().st_mtime_ns for c in checkpoints.checkpoints(self.run)}

        def new() -> list[Path]:
            return [c for c in checkpoints.checkpoints(self.run) if first.get(c) != mtime(c)]

        def there() -> bool:
            if moment == SAVING:
                return any(not checkpoints.is_sealed(c) for c in new())
            return any(checkpoints.number(c) >= goal or c in first for c in new())

        if moment == SAVING:
            self._sleep(0, 1)
        self._until(lambda: start.ended() or there(), start)
        self._sleep(0, 0.01 if moment == SAVING else 0.3)
        return not start.ended()

    def _strike(self, kind: str, start: Start) -> int | None:
        """The fault itself; of one rank that is killed, which."""
        victim = self.moments.randrange(self.layout.ranks) if kind == RANK else None
        if kind == KILL:
            start.kill()
        elif kind == FULL:
            assert self.disk is not None
            self.disk.fill()
        elif kind == RANK:
            start.tell(signal.SIGKILL, victim)
        else:
            alone = isinstance(start, Pooled) and "validation blocks of" in start.output() and self._trains(start)
            start.tell(signal.Signals[kind], self.moments.randrange(self.layout.ranks) if alone else None)
        return victim

    def _trains(self, start: Start) -> bool:
        """Whether all ranks wait for signals at the end of steps, where one speaks for all."""
        return self.moments.random() < 0.5 and re.search(r"^step \d+/", start.output(), re.MULTILINE) is not None

    def _second(self, first: Start) -> None:
        """Another launch in the folder is refused in one line, and the first goes on."""
        self._other = None
        self._until(lambda: first.ended() or "validation blocks of" in first.output(), first)  # it has the lock
        self._sleep(0, 1.5)
        if first.ended():
            return
        more = self.moments.choice(([], ["--resume_from_checkpoint", "true"]))
        second = Pooled(self.pool, self.layout, self.run, [str(self.config), "--output_dir", str(self.run),
                        *self.layout.engine, *more])  # fmt: skip
        codes, lines = second.wait(), second.lines()
        if first.ended():
            return  # the folder was free
        demand(set(codes) == {2}, "a second process ended with", codes, second.output()[-2000:])
        demand(len(lines) == 1 and "is in use by process" in lines[0], "a second process said", lines)
        demand((self.run / LOCK).exists(), "the lock is gone")
        self._clean(second)
        self._count(SECOND, f"{'resuming' if more else 'new'}; the first goes on", lines[0])

    # ---- what must hold after each fault ----------------------------------------------------------------------------

    def _clean(self, start: Start) -> None:
        demand(not self.mark.exists(), "a poisoned file was executed")
        demand(not start.traceback(), "a traceback:", start.output()[-3000:])
        demand(len(start.lines()) <= self.layout.ranks, "more than a line a rank:", start.lines())
        demand(not start.left(), "left behind:", start.left())

    def _nothing_lost(self, before: list[Path]) -> None:
        """Whole checkpoints are whole still, but for those that save_total_limit has removed."""
        sealed = [c for c in checkpoints.checkpoints(self.run) if checkpoints.is_sealed(c)]
        for checkpoint in before:
            newer = [c for c in sealed if mtime(c) > (mtime(checkpoint) or 0) and c != checkpoint]
            demand(
                sound(checkpoint) or len(newer) >= KEPT,
                checkpoint.name,
                "was lost; there are",
                [c.name for c in sealed],
            )
        file = self.run / history.HISTORY_FILE
        for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
            demand(line.count('"time"') <= 1, "two events on a line of history.jsonl:", line)

    def _until(self, there: Callable[[], bool], start: Start, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            demand(time.monotonic() < deadline, "it never came", start.output()[-2000:])
            time.sleep(0.001)

    def _sleep(self, least: float, most: float) -> None:
        time.sleep(self.moments.uniform(least, most))

    def _count(self, kind: str, what: str, line: str = "") -> None:
        self.counts[kind] += 1
        said = line.replace(str(self.folder), "...")
        print(f"{self.layout.name:6} {self.counts.total():3} {kind:16} {what}{said and ': ' + said}", flush=True)


def mtime(checkpoint: Path) -> int | None:
    try:
        return checkpoint.stat().st_mtime_ns
    except FileNotFoundError:
        return None
