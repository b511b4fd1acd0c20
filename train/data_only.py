"""Files are data: in a block of ``data_only`` none that ``torch.load`` reads runs code, whoever calls it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# torch's own variables; the first holds also where a library asks for weights_only=False, as DeepSpeed's engine does
FORCED, REVOKED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def data_only() -> Iterator[None]:
    """``torch.load`` takes tensors, plain values and ``torch.serialization.safe_globals`` only."""
    before = {name: os.environ.pop(name, None) for name in (FORCED, REVOKED)}
    os.environ[FORCED] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
