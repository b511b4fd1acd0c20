"""history.jsonl: what has happened in a run's folder, a line for each start and each end, never rewritten."""

from __future__ import annotations

import os
import platform
import socket
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from ... import __version__
from ..atomic_write import valid_json

HISTORY_FILE = "history.jsonl"


def append(output_dir: Path, event: str, step: int, **what: Any) -> None:
    """Add an event that came after ``step`` steps."""
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, "step": step, **what}
    with (output_dir / HISTORY_FILE).open("a+b") as file:
        file.seek(-min(file.tell(), 1), os.SEEK_END)
        cut_short = file.read() not in (b"", b"\n")  # a line, by a full disk or a kill
        file.write((b"\n" if cut_short else b"") + valid_json(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def surroundings() -> dict[str, str]:
    """Where a run runs, and with which versions."""
    versions = {"gracile": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "python": platform.python_version(), "host": socket.gethostname()}
