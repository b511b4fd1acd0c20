"""Rows of numbers in 4 or 8 bits: evenly spaced codes between the smallest and the largest of each row. Of several
tensors where there is a dimension before the rows."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

from .spec import Placement, StateSpec

BITS = (4, 8)
PARTS = 8
TINY = torch.finfo(torch.float32).tiny


def packed_specs(name: str, rows: int, width: int, bits: int, placement: Placement, kind: str) -> list[StateSpec]:
    """``rows`` of ``width`` numbers, packed: ``name`` (rows x bytes, uint8), ``name_scale`` and ``name_minimum``
    (rows x 1, fp32). They travel packed: a row is never split."""
    shapes = {name: -(-width * bits // 8), f"{name}_scale": 1, f"{name}_minimum": 1}
    return [
        StateSpec(key, (rows, size), torch.uint8 if key == name else torch.float32, placement, kind=kind)
        for key, size in shapes.items()
    ]


def packed(name: str, values: Tensor, bits: int) -> dict[str, Tensor]:
    """``values`` (rows x width) as ``packed_specs`` declares them.

    Off by at most half a step, (max - min) / (2^bits - 1) / 2, where a step is a normal number of fp32; a constant row
    is exact. The minimum is stored as it is: a zero point among the codes cannot reach rows far from zero. Two 4-bit
    codes share a byte, the first in its low half.
    """
    values = values.float()
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    codes = ((values - low) / scale.clamp(min=TINY)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return {name: codes, f"{name}_scale": scale, f"{name}_minimum": low}


def pack_(name: str, values: Tensor, bits: int, state: MutableMapping[str, Tensor]) -> None:
    """Write ``values`` (rows x width) into ``state`` as ``packed`` has them, some rows at a time: codes are made in
    fp32, and all of them would be another matrix."""
    begin = 0
    for rows in torch.chunk(values, PARTS, dim=-2):
        end = begin + rows.shape[-2]
        for key, value in packed(name, rows, bits).items():
            state[key][..., begin:end, :] = value
        begin = end


def unpacked(name: str, state: Mapping[str, Tensor], width: int, bits: int) -> Tensor:
    """The rows (rows x width, fp32) that ``packed`` stored under ``name``."""
    codes = state[name]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :width]
    return codes.float().mul_(state[f"{name}_scale"]).add_(state[f"{name}_minimum"])
