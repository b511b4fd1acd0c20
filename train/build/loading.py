"""A checkpoint's weights and optimizer state, without a second copy of them beside those of the run.

A model that only just fits is there once while it is trained, and must be there once while it is loaded: weights come
some modules at a time from files that are opened for them, of which no page stays, and the optimizer takes over the
tensors that were read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...optim.core.optimizer import ShardedOptimizer

AT_ONCE = 2**28  # bytes of weights that are looked at together, at most
WIDE = 8  # bytes of an element, at most


class Loaded(NamedTuple):
    """Names on one side only, as ``nn.Module.load_state_dict`` tells them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def has_weights(checkpoint: Path) -> bool:
    """Whether a checkpoint holds a model's weights as safetensors."""
    return any((checkpoint / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def load_weights(model: nn.Module, checkpoint: Path) -> Loaded:
    """A checkpoint's weights into a model that is there, whole modules at a time."""
    missing: dict[str, None] | None = None
    unexpected: list[str] = []
    for piece in _pieces(checkpoint):
        found = model.load_state_dict(piece, strict=False)
        still = dict.fromkeys(found.missing_keys)
        missing = still if missing is None else {name: None for name in missing if name in still}
        unexpected += found.unexpected_keys
    return Loaded(list(missing or ()), unexpected)


def _pieces(checkpoint: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of a checkpoint, those of a module together. Each is mapped from its file as long as the piece is
    held; a file that is opened once would keep what was read of it."""
    piece: list[tuple[str, Path]] = []
    size = 0
    for names in _by_module(checkpoint).values():
        if piece and size + sum(names.values()) > AT_ONCE:
            yield _read(piece)
            piece, size = [], 0
        piece += names
        size += sum(names.values())
    yield _read(piece)


def _by_module(checkpoint: Path) -> dict[str, dict[tuple[str, Path], int]]:
    """Of each module its tensors, with their bytes at most."""
    modules: dict[str, dict[tuple[str, Path], int]] = {}
    for file in _files(checkpoint):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- no mapping
                elements = math.prod(opened.get_slice(name).get_shape())
                modules.setdefault(name.rpartition(".")[0], {})[name, file] = WIDE * elements
    return modules


def _files(checkpoint: Path) -> list[Path]:
    whole, index = checkpoint / SAFE_WEIGHTS_NAME, checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        return [whole]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} names files outside of its folder")
    return [checkpoint / name for name in names]


def _read(piece: list[tuple[str, Path]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(file for _, file in piece):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name, its in piece if its == file}
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, file: Path) -> None:
    """A saved ``state_dict()``, of which this package's optimizers keep the tensors."""
    saved = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.load_state_dict(saved, assign=True)
    else:
        optimizer.load_state_dict(saved)
