"""Weights in 8 bits written back, one number after the other, in Python's floats.

A group keeps its scale while 0.45 * 127 <= max |w| / scale <= 127, or has no weight but zeros; otherwise the scale
changes by the power of two that brings the largest weight to more than half of the codes. Then each weight goes up or
down by chance: floor(w / scale + u), with u of 16 bits in the middle of their step; or to the nearest code, and to the
even one of two.
"""

import math

import torch


def written(scales, wide, group_size, noise=None):
    """Codes and scales of a matrix ``wide`` whose scales were ``scales`` (m x groups); ``noise``, 16 bits for each."""
    codes, found = torch.zeros(wide.shape, dtype=torch.int8), scales.clone()
    m, n = wide.shape
    for i in range(m):
        for group, begin in enumerate(range(0, n, group_size)):
            columns = range(begin, min(begin + group_size, n))
            weights = [wide[i, j].item() for j in columns]
            if not all(map(math.isfinite, weights)):
                found[i, group] = math.nan
                continue
            scale = _fitting(max(map(abs, weights)), scales[i, group].item())
            found[i, group] = scale
            for j, w in zip(columns, weights, strict=True):
                u = None if noise is None else (noise[i, j].item() + 0.5) / 65536
                codes[i, j] = round(w / scale) if u is None else math.floor(w / scale + u)
    return codes, found


def _fitting(largest, scale):
    if largest == 0 or 0.45 * 127 <= largest / scale <= 127:
        return scale
    while largest > 127 * scale:
        scale *= 2
    while largest <= 127 * scale / 2:
        scale /= 2
    return scale
