"""Files that run code where they are loaded without care: they would leave a mark."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch


class Poison:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def poison(file: Path, mark: Path) -> None:
    """Put in the file's place one of its kind that runs code."""
    if file.suffix in (".pt", ".pth", ".bin"):
        held = torch.load(file, weights_only=False, map_location="cpu") if file.exists() else {}
        held = held if isinstance(held, dict) else {"args": held}
        torch.save({**held, "more": Poison(mark)}, file)
    elif file.suffix in (".yaml", ".yml"):
        file.write_text(f"config: !!python/object/apply:builtins.open ['{mark}', w]\n")
    else:
        file.write_bytes(pickle.dumps(Poison(mark)))
