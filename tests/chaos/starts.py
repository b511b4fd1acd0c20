"""One start of the command, on all its processes: forked from the pool, or by the launchers that users have."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from chaos.layouts import Layout
from launched import launched, launcher_of, processes_of, ranks_of
from pool import Pool

COMMAND = str(Path(__file__).with_name("command.py"))
LINE = re.compile(r"^gracile(?: pretrain)?: .*", re.MULTILINE)
PATIENCE = 5.0  # seconds in which what a run has started must be gone, and other ranks have noticed


class Start:
    """Of a run in ``folder``."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self.layout, self.folder = layout, folder

    def lines(self) -> list[str]:
        return LINE.findall(self.output())


class Pooled(Start):
    name = "pooled"

    def __init__(self, pool: Pool, layout: Layout, folder: Path, arguments: list[str]) -> None:
        super().__init__(layout, folder)
        self.job = pool.start(layout.ranks, COMMAND, "pretrain", *arguments)

    def began(self) -> bool:
        return self.output().count("begun\n") == self.layout.ranks

    def ended(self) -> bool:
        return self.job.ended()

    def tell(self, which: int, rank: int | None = None) -> None:
        """A signal to one rank, or to all."""
        for each in range(self.layout.ranks) if rank is None else [rank]:
            self.job.signal(which, each)

    def kill(self) -> None:
        self.job.kill()

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes of the ranks."""
        self.job.wait(seconds)
        return [self.job.codes[rank] for rank in range(self.layout.ranks)]

    def output(self) -> str:
        return self.job.output()

    def traceback(self) -> bool:
        return "Traceback" in self.output()

    def left(self) -> list[str]:
        return [f"what rank {rank} has started" for rank in self.job.left]


class Launched(Start):
    """By ``python``, ``torchrun`` or ``deepspeed``."""

    def __init__(self, layout: Layout, folder: Path, arguments: list[str], log: Path) -> None:
        super().__init__(layout, folder)
        self.log, self.name = log, layout.launcher or "python"
        command = [sys.executable, COMMAND, "pretrain", *arguments]
        if layout.launcher is not None:
            command = launched(layout.launcher, "gracile.train.pretrain", *arguments)
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True, env=environment
            )

    def began(self) -> bool:
        return self.layout.launcher is not None or "begun\n" in self.output()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def tell(self, which: int, rank: int | None = None) -> None:
        """Ctrl-C comes from the terminal to all, SIGTERM from a scheduler to the launcher; or one rank has a signal."""
        if rank is not None:
            os.kill(sorted(ranks_of(self.folder))[rank], which)
        elif which == signal.SIGINT:
            os.killpg(self.process.pid, which)
        else:
            os.kill(launcher_of(self.process.pid), which)

    def kill(self) -> None:
        while found := processes_of(self.folder):  # the launcher, which has the folder in its command too, and ranks
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.poll()

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit code of the launcher."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        return [self.process.returncode]

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def traceback(self) -> bool:
        """One of ours: torchrun prints one of its own when a rank has failed."""
        return re.search(r'Traceback(?s:.)*File "[^"]*/train/pretrain\.py"', self.output()) is not None

    def left(self) -> list[str]:
        until = time.monotonic() + PATIENCE
        while (found := processes_of(self.folder)) and time.monotonic() < until:
            time.sleep(0.05)
        return [f"process {pid}" for pid in found]
