"""A small file system that the runs have for themselves, and that can be full."""

from __future__ import annotations

import random
import subprocess
from contextlib import suppress
from pathlib import Path

SIZE = 96  # MiB; the largest run takes 25


class Disk:
    def __init__(self, folder: Path, moments: random.Random) -> None:
        self.folder, self.moments = folder, moments
        self.ballast = folder / "ballast"

    @classmethod
    def mounted(cls, folder: Path, moments: random.Random) -> Disk:
        """In the namespace of this process, with which it goes."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "none", str(folder)], check=True)
        return cls(folder, moments)

    def fill(self) -> None:
        """Leave nothing, or some hundred kilobytes, so that a file is met in its middle."""
        block = bytes(2**20)
        with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while True:
                if file.write(block) < len(block):
                    break
        left = self.moments.choice((0, 4096, self.moments.randrange(600_000)))
        with self.ballast.open("r+b") as file:
            file.truncate(max(self.ballast.stat().st_size - left, 0))

    def empty(self) -> None:
        self.ballast.unlink(missing_ok=True)
