"""N of every M: where the largest of each M consecutive weights are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .validation import is_whole, require

MOST = 256  # places in a group are counted in a byte


def check_pattern(n: Any, m: Any) -> None:
    """Refuse what is no pattern."""
    require(is_whole(m) and 2 <= m <= MOST, f"m must be a whole number from 2 to {MOST}", m)
    require(is_whole(n) and 1 <= n <= m, f"n must be a whole number from 1 to m={m}", n)


def largest(weight: Tensor, n: int, m: int, at_once: bool = False) -> Tensor:
    """Where the ``n`` largest |w| of each ``m`` consecutive entries of the last dimension are (bool, as ``weight``).

    Exactly n of each, and of equals the first: what an entry's group has before it, the larger ones and the equals of
    lower index, is counted. torch.topk leaves ties open, and a stable sort needs 64-bit places, twice a fp32 weight.
    ``at_once``, all pairs of a group together: nine launches on a GPU, not 4 m, and m bytes an entry.
    """
    return largest_sizes(weight.detach().abs(), n, m, at_once)


def largest_sizes(sizes: Tensor, n: int, m: int, at_once: bool = False) -> Tensor:
    """``largest`` of |w|."""
    sizes = sizes.unflatten(-1, (-1, m))
    if at_once:
        own, other = sizes[..., :, None], sizes[..., None, :]
        before = (other >= own).tril_(-1).sum(-1, dtype=torch.uint8)
        before += (other > own).triu_(1).sum(-1, dtype=torch.uint8)
        return (before < n).flatten(-2)
    before = torch.zeros(sizes.shape, dtype=torch.uint8, device=sizes.device)
    for j in range(m):
        own = sizes[..., j : j + 1]
        before[..., :j] += own > sizes[..., :j]
        before[..., j + 1 :] += own >= sizes[..., j + 1 :]
    return (before < n).flatten(-2)
