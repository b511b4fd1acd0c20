"""A model with weights in 8 bits saved as the ordinary one, of which only a file's weights are opened at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..int8_weight import Int8Weight

SHARD_BYTES = 2**28  # so that a run which only just fits can save its model


class _Part(NamedTuple):
    name: str
    held: Tensor

    @property
    def nbytes(self) -> int:
        """Of the ordinary tensor."""
        return math.prod(self.held.shape) * self.held.element_size()

    def open(self) -> Tensor:
        return self.held.open() if isinstance(self.held, Int8Weight) else self.held


def save_dequantized(model: PreTrainedModel, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """What ``dequantize_weights(model).save_pretrained(folder)`` saves, without ever having such a model.

    Args:
        model: with layers of ``gracile.models.int8``, not split over processes.
        folder: where ``AutoModelForCausalLM.from_pretrained`` will find it.
        shard_bytes: of the largest file, but for a weight that is larger by itself.

    Raises:
        OSError: where a file cannot be written.
    """
    files = list(_shards(_parts(model), shard_bytes))
    names = [SAFE_WEIGHTS_NAME]
    if len(files) > 1:
        names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    for name, parts in zip(names, files, strict=True):
        save_file({part.name: part.open().contiguous() for part in parts}, folder / name, {"format": "pt"})
    if len(files) > 1:
        of = {part.name: name for name, parts in zip(names, files, strict=True) for part in parts}
        total = sum(part.nbytes for parts in files for part in parts)
        index = {"metadata": {"total_size": total}, "weight_map": of}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


@torch.no_grad()
def _parts(model: PreTrainedModel) -> Iterator[_Part]:
    """What a state dict of the ordinary model has, but for what is tied to something else."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for name, p in module.named_parameters(recurse=False):
            if prefix + name not in tied:
                yield _Part(prefix + name, p.detach())
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield _Part(prefix + name, buffer)


def _shards(parts: Iterator[_Part], size: int) -> Iterator[list[_Part]]:
    shard: list[_Part] = []
    for part in parts:
        if shard and sum(one.nbytes for one in shard) + part.nbytes > size:
            yield shard
            shard = []
        shard.append(part)
    yield shard
