"""What tests of several files do alike."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# ---- gradients ------------------------------------------------------------------------------------------------------


def gradients(*shape: int, steps: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """One matrix's, of a sequence of steps: at random, of sizes 1, 2, 3, 1, 2, 3, ..."""
    generator = torch.Generator().manual_seed(seed)
    return [(1 + t % 3) * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for t in range(steps)]


def gradients_of(held: Iterable[Tensor], t: int) -> list[Tensor]:
    """Those of several parameters at step ``t``, with a part that stays, so that some places promise more than others.
    They depend on the step's number alone."""
    held = list(held)
    staying, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(1000 + t)
    both = [[torch.randn(p.shape, generator=g, dtype=torch.float64) for p in held] for g in (staying, noise)]
    return [(a + b).to(p.dtype) for a, b, p in zip(*both, held, strict=True)]


def held_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer: torch.optim.Optimizer, held: Iterable[Tensor], given: Iterable[Tensor]) -> None:
    for p, G in zip(held, given, strict=True):
        p.grad = G.clone()
    optimizer.step()


# ---- runs of gracile pretrain ---------------------------------------------------------------------------------------


def weights(output_dir: str | Path) -> dict[str, Tensor]:
    return load_file(Path(output_dir) / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def interrupt(output_dir: Path, copy: Path, keep: str) -> Path:
    """The folder as a kill after checkpoint ``keep`` would have left it."""
    shutil.copytree(output_dir, copy)
    for checkpoint in copy.glob("checkpoint-*"):
        if checkpoint.name != keep:
            shutil.rmtree(checkpoint)
    for name in ("metrics.json", "model.safetensors", "config.json", "loss.png"):
        (copy / name).unlink()
    return copy
