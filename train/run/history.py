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
    with (output_dir / HISTORY_FILE).open("a", encoding="utf-8") as file:
        file.write(valid_json(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def surroundings() -> dict[str, str]:
    """Where a run runs, and with which versions."""
    versions = {"gracile": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**versions, "python": platform.python_version(), "host": socket.gethostname()}
