"""Files that have changed since they were written, and what a resumption must say of each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from poison import poison

from gracile.train.run import checkpoints

RUN_FILE = "run.yaml"
# Nothing reads them; with a manifest to match they are as good as any.
UNREAD = ("training_args.bin", "zero_to_fp32.py", "zero_to_torch.py")


@dataclass(frozen=True)
class Damage:
    """``file`` of ``checkpoint``, or of the run's folder, was changed.

    ``answer``: "skipped", where the checkpoint before is taken; "refused", with the one line; "either"; or "taken".
    """

    kind: str
    file: Path
    checkpoint: Path | None
    answer: str
    sealed: bool = False

    def __str__(self) -> str:
        inside = self.file.name if self.checkpoint is None else self.file.relative_to(self.checkpoint.parent)
        return f"{inside}{', with a manifest to match' if self.sealed else ''}"


def truncate(file: Path, moments: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: moments.randrange(len(data))])


def flip(file: Path, moments: random.Random) -> None:
    """One bit."""
    data = bytearray(file.read_bytes())
    data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
    file.write_bytes(data)


def inflict(kind: str, run: Path, checkpoint: Path, moments: random.Random, mark: Path) -> Damage:
    """Change a file of the checkpoint or, now and then, run.yaml."""
    change: dict[str, Callable[[Path], None]] = {
        "truncated": lambda file: truncate(file, moments),
        "flipped": lambda file: flip(file, moments),
        "poisoned": lambda file: poison(file, mark),
    }
    if moments.random() < 0.15:
        change[kind](run / RUN_FILE)
        return Damage(kind, run / RUN_FILE, None, "refused" if kind == "poisoned" else "either")
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.stat().st_size]
    # a bit is the likelier to flip in a file, the more it has
    (file,) = moments.choices(files, [path.stat().st_size for path in files] if kind == "flipped" else None)
    change[kind](file)
    sealed = kind == "poisoned" and file.name != checkpoints.MANIFEST and moments.random() < 0.6
    if not sealed:
        return Damage(kind, file, checkpoint, "skipped")
    checkpoints.seal(checkpoint)
    pickled = file.suffix in (".pt", ".pth", ".bin")
    answer = "taken" if file.name in UNREAD else "refused" if pickled else "skipped"
    return Damage(kind, file, checkpoint, answer, sealed=True)
