"""One run, one folder: a file in ``output_dir`` that names the process that writes there.

The first process of a launch holds it. A process that has died leaves its file behind: it is taken over on the same
host, where that can be seen.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import BadInput

LOCK = "run.lock"
BOOT = Path("/proc/sys/kernel/random/boot_id")
PATIENCE = 1.0  # seconds that an empty lock may need to be written


@dataclass(frozen=True)
class Owner:
    """A process, so that it is told from a later one of the same number. ``born`` and ``boot`` are Linux's."""

    host: str
    pid: int
    born: str | None
    boot: str | None
    since: str

    @classmethod
    def this(cls) -> Owner:
        pid = os.getpid()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), pid, _born(pid), _boot(), now)

    @property
    def is_dead(self) -> bool:
        """Whether it has certainly ended; False where that cannot be known, as of another host."""
        if self.host != socket.gethostname():
            return False
        if (self.born is not None and self.boot != _boot()) or not _exists(self.pid):
            return True
        born = _born(self.pid)
        return self.born is not None and born != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _born(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None where that is not told, "" for one that has ended."""
    if not BOOT.exists():
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _boot() -> str | None:
    try:
        return BOOT.read_text().strip()
    except OSError:
        return None


@contextmanager
def held(output_dir: Path) -> Iterator[None]:
    """The folder is this process's own in the block; folders that were made for it, and are still empty, go after it.

    Raises:
        BadInput: where another process has it, or it cannot be made.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise BadInput(f"output_dir {str(output_dir)!r} is a file; choose another")
    missing = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    lock, text = output_dir / LOCK, json.dumps(asdict(Owner.this()))
    try:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            _acquire(lock, text)
        except OSError as error:
            raise BadInput(
                f"output_dir {str(output_dir)!r} cannot be written to: {error.strerror}; choose another"
            ) from None
        yield
    finally:
        with suppress(OSError):  # of a folder that is gone
            if lock.read_text(encoding="utf-8") == text:
                lock.unlink()
        _remove_empty(missing)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _acquire(lock: Path, text: str) -> None:
    while True:
        try:
            with open(lock, "x", encoding="utf-8") as file:
                try:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                except BaseException:  # a signal too: nobody may be left with a lock that says nothing
                    lock.unlink()
                    raise
            return
        except FileExistsError:
            pass
        found = _read(lock)
        if found is not None:
            _take_over(lock, found)


def _read(lock: Path) -> str | None:
    """What is in the lock; None if it is gone meanwhile. One that was just made is waited for."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            text = lock.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        if text.endswith("}") or time.monotonic() > deadline:
            return text
        time.sleep(0.02)


def _take_over(lock: Path, text: str) -> None:
    """Put the lock of a dead process out of the way.

    Raises:
        BadInput: where its owner lives, or may live.
    """
    folder = str(lock.parent)
    try:
        owner = Owner(**json.loads(text))
        dead, elsewhere = owner.is_dead, owner.host != socket.gethostname()
    except (TypeError, ValueError):
        raise BadInput(
            f"output_dir {folder!r} is locked, and {LOCK} does not say by whom; if no run writes there, remove {lock}"
        ) from None
    if not dead:
        way = f"; if that one has ended, remove {lock}" if elsewhere else ""
        raise BadInput(
            f"output_dir {folder!r} is in use by {owner}: wait until it ends, or choose another --output_dir{way}"
        )
    with suppress(FileNotFoundError), lock.open("rb") as file:
        _one_at_a_time(file)
        if os.path.samestat(os.fstat(file.fileno()), lock.stat()):  # else someone else was faster, and it is theirs
            lock.unlink()
            print(f"{folder} was left locked by {owner}, which has ended")


def _one_at_a_time(file: BinaryIO) -> None:
    """Two processes that find the same dead lock, of this host: the second waits until the first has removed it."""
    with suppress(ImportError, OSError):  # where the file system has no locks, or the system no such call
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
