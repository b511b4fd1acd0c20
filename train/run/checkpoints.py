"""Which checkpoints are whole: those with a manifest, which is written last, so that a killed run leaves none."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..atomic_write import write_atomically

MANIFEST = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")


def seal(checkpoint: Path) -> None:
    """Write the manifest: every file of the checkpoint with its size, in one atomic rename."""
    sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    sizes.pop(MANIFEST, None)
    write_atomically(checkpoint / MANIFEST, json.dumps(sizes, indent=1))


def unseal(checkpoint: Path) -> None:
    """Remove the manifest before a checkpoint is written again, so that it cannot vouch for half-new files."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)


def fault(checkpoint: Path) -> str | None:
    """Why the checkpoint cannot be used, or None if it is whole."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"its writing was cut short ({MANIFEST} is missing)"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, newest step first, whole or not."""
    found = [(NAME.fullmatch(p.name), p) for p in output_dir.glob("checkpoint-*") if p.is_dir()]
    return [p for match, p in sorted(((m, p) for m, p in found if m), key=lambda pair: -int(pair[0][1]))]


def newest_whole(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, and the newer ones that were skipped, each with its fault."""
    skipped: dict[Path, str] = {}
    for checkpoint in checkpoints(output_dir):
        reason = fault(checkpoint)
        if reason is None:
            return checkpoint, skipped
        skipped[checkpoint] = reason
    return None, skipped
