"""Files that are written whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` in one step, so that a reader, a kill or a power cut never leaves half of it."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staging.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before what was renamed
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def valid_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON, which has no Infinity and no NaN: these are null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def non_finite(value: Any, name: str = "") -> Iterator[str]:
    """The names of numbers that ``valid_json`` writes as null."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from non_finite(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from non_finite(item, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield name


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
