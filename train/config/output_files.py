"""Whether an output file can be written, checked before the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import BadInput


def check_output(key: str, text: str, suffixes: Sequence[str]) -> None:
    """Raise ``BadInput`` for a path that cannot be written, or that has another suffix."""
    path = Path(text)
    if path.suffix.lower() not in suffixes:
        raise BadInput(f"{key} must be a {' or '.join(suffixes)} file, got {text!r}")
    if not path.parent.is_dir():
        raise BadInput(f"{key}: the folder of {text!r} does not exist; make it, or choose another")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise BadInput(f"{key}: {text!r} cannot be written: {error.strerror}; choose another") from None
    if not existed:
        path.unlink()
