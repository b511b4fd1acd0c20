"""Random projections from a seed: columns of normal numbers with variance 1/r, the same on every process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed import ProjectionSide

_DRAWS = 15  # numbers a seed advances by


def gaussian_columns(side: ProjectionSide, seed: int, device: torch.device) -> Tensor:
    """side x r normal numbers of variance 1/r in fp32, so that E |P^T g|^2 = |g|^2. Not orthonormal.

    Drawn on ``device``, in the order of APOLLO's code; a GPU and a CPU draw different numbers from one seed.
    """
    return gaussian_stack(side, [seed], device)[0]


def gaussian_stack(side: ProjectionSide, seeds: Sequence[int], device: torch.device) -> Tensor:
    """``gaussian_columns`` of each seed (seeds x side x r)."""
    length, rank = side.basis_shape
    shape = (rank, length) if side.right else (length, rank)
    columns = torch.empty(len(seeds), *shape, dtype=torch.float32, device=device)
    generator = torch.Generator(device=device)
    for own, seed in zip(columns, seeds, strict=True):
        own.normal_(generator=generator.manual_seed(seed))
    columns.div_(math.sqrt(rank))
    return columns.mT if side.right else columns


def following(seed: int) -> int:
    """The seed after ``seed``, as APOLLO's code advances it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return int(torch.randint(0, torch.iinfo(torch.int64).max, (_DRAWS,), generator=generator, device="cpu")[-1])
