"""Which checkpoints are whole: those with a manifest, which is written last, and whose files are what it says.

The manifest holds the size and the checksum of each file: SHA-256 over those of its parts, which are computed side by
side, while what was written is still in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..atomic_write import write_atomically
from .contents import unreadable

MANIFEST = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")
PART, CHUNK = 2**26, 2**20  # bytes of a file that one thread hashes, and that it reads at a time
WORKERS = min(8, os.cpu_count() or 1)
_distrusted: dict[Path, int] = {}  # damaged ones that were seen, and when their manifests were written


class Entry(NamedTuple):
    """A file as it was written. Older manifests have no checksums."""

    size: int
    checksum: str | None


def seal(checkpoint: Path) -> None:
    """Write the manifest, in one atomic rename, once every file is on the disk."""
    files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p.name != MANIFEST]
    found = {str(file.relative_to(checkpoint)): list(entry) for file, entry in _measured(files, sync=True)}
    write_atomically(checkpoint / MANIFEST, json.dumps({"files": found}, indent=1))


def unseal(checkpoint: Path) -> None:
    """Remove the manifest before a checkpoint is written again, so that it cannot vouch for half-new files."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)


def fault(checkpoint: Path, sizes_only: bool = False) -> str | None:
    """Why the checkpoint cannot be used, or None if it is whole.

    With ``sizes_only`` nothing is read, and what ``distrust`` was told is remembered.

    Raises:
        AsksForCode: for a file that is no data; not with ``sizes_only``.
    """
    if sizes_only and checkpoint in _distrusted and _distrusted[checkpoint] == _sealed_at(checkpoint):
        return "it was damaged when it was last looked at"
    try:
        entries = _entries(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return f"its writing was cut short ({MANIFEST} is missing)"
    except (OSError, ValueError, TypeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    files = {checkpoint / name: entry for name, entry in entries.items()}
    try:
        wrong = _wrong_size(checkpoint, files) or (None if sizes_only else _wrong_bytes(checkpoint, files))
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    if wrong is not None or sizes_only:
        return wrong
    return next((reason for reason in map(unreadable, files) if reason is not None), None)


def distrust(checkpoint: Path) -> None:
    """Remember that a checkpoint is not whole, until it is written anew."""
    _distrusted[checkpoint] = _sealed_at(checkpoint)


def rotate(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Remove the oldest checkpoints beyond ``limit``, but not the ``best``.

    Those that are not whole go first: none of them may push out one that a run can go on from.
    """
    found = sorted(checkpoints(output_dir), key=lambda checkpoint: (_sealed_at(checkpoint), number(checkpoint)))
    broken = [checkpoint for checkpoint in found if fault(checkpoint, sizes_only=True) is not None]
    whole = [checkpoint for checkpoint in found if checkpoint not in broken]
    gone = [checkpoint for checkpoint in [*broken, *whole[:-1]] if best is None or checkpoint != Path(best)]
    for checkpoint in gone[: max(len(found) - limit, 0)] if limit else []:
        unseal(checkpoint)  # half a removal is no checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)


def _sealed_at(checkpoint: Path) -> int:
    try:
        return (checkpoint / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def is_sealed(checkpoint: Path) -> bool:
    """Whether its writing came to its end, whatever has happened since."""
    return (checkpoint / MANIFEST).exists()


def has_checksums(checkpoint: Path) -> bool:
    """Whether a whole checkpoint has them; older ones do not."""
    entries = _entries(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))
    return all(entry.checksum is not None for entry in entries.values())


def _entries(told: Any) -> dict[str, Entry]:
    if not isinstance(told, dict):
        raise TypeError(f"a {type(told).__name__}")
    if isinstance(told.get("files"), dict):
        entries = {name: Entry(*found) for name, found in told["files"].items()}
    else:
        entries = {name: Entry(size, None) for name, size in told.items()}
    for name, entry in entries.items():
        outside = Path(name).is_absolute() or ".." in Path(name).parts
        if outside or not isinstance(entry.size, int) or not isinstance(entry.checksum, (str, type(None))):
            raise ValueError(name)
    return entries


def _wrong_size(checkpoint: Path, files: dict[Path, Entry]) -> str | None:
    for file, entry in files.items():
        name = file.relative_to(checkpoint)
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry.size:
            return f"{name} has {file.stat().st_size} of {entry.size} bytes"
    return None


def _wrong_bytes(checkpoint: Path, files: dict[Path, Entry]) -> str | None:
    for file, now in _measured([file for file, entry in files.items() if entry.checksum is not None]):
        if now.checksum != files[file].checksum:
            return f"{file.relative_to(checkpoint)} is not what was written (its checksum differs)"
    return None


def _measured(files: list[Path], sync: bool = False) -> Iterator[tuple[Path, Entry]]:
    with ThreadPoolExecutor(WORKERS) as pool:
        sizes = [file.stat().st_size for file in files]
        parts = [
            [pool.submit(_hash, file, start) for start in range(0, size, PART)]
            for file, size in zip(files, sizes, strict=True)
        ]
        written = [pool.submit(_sync, file) for file in files] if sync else []
        try:
            for file, size, found in zip(files, sizes, parts, strict=True):
                whole = hashlib.sha256(b"".join(part.result() for part in found))
                yield file, Entry(size, whole.hexdigest())
            for done in written:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _hash(file: Path, start: int) -> bytes:
    found = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        left = PART
        while left and (data := opened.read(min(left, CHUNK))):
            found.update(data)
            left -= len(data)
    return found.digest()


def _sync(file: Path) -> None:
    """Wait until a file is on the disk, so that a manifest that outlives a power cut does not vouch for lost bytes."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, newest step first, whole or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=number, reverse=True)


def number(checkpoint: Path) -> int:
    """The step in its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_whole(output_dir: Path, sizes_only: bool = False) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, and the newer ones that were skipped, each with its fault."""
    skipped: dict[Path, str] = {}
    for checkpoint in checkpoints(output_dir):
        reason = fault(checkpoint, sizes_only)
        if reason is None:
            return checkpoint, skipped
        skipped[checkpoint] = reason
    return None, skipped
