"""Linear layers for inference with at most two of every four consecutive weights of a row, on GPUs that compute so.

    V: m x n/2 values,  positions 0 to 3 in their four: two bits each, four to a byte (m x n/8)

The kernel's own form of W (``torch.sparse.to_sparse_semi_structured``) is made where the layer is first used; what is
saved is V and the positions, which any machine can read.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...validation import require
from .condensed import InferenceLinear

CAPABILITY = (8, 0)  # of the first GPUs with sparse tensor cores
DTYPES = (torch.float16, torch.bfloat16)


class SemiStructuredLinear(InferenceLinear):
    """For inference: 2:4 sparse W in 16 bits; in must be a multiple of 8.

    Computes on a GPU of capability 8.0 or later alone; it is packed, saved and merged on any machine. ``values`` are
    out x in / 2, ``positions`` out x in / 8 bytes.

    Args:
        in_features, out_features, tensors, bias: as for ``InferenceLinear``.

    Raises:
        ValueError: as ``InferenceLinear``, where more than 2 of 4 weights are kept, and in use without such a GPU.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import NMLinear, SemiStructuredLinear
        >>> pruned = NMLinear(64, 32, n=2, m=4).merge().half()
        >>> layer = SemiStructuredLinear.from_linear(pruned)
        >>> layer.values.shape, layer.positions.shape, torch.equal(layer.merge().weight, pruned.weight)
        (torch.Size([32, 32]), torch.Size([32, 8]), True)
    """

    form = "2:4"
    places: ClassVar = {"positions": torch.uint8}
    positions: Tensor

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
        m, n = weight.shape
        require(n % 8 == 0, "in must be a multiple of 8", n)
        fours = mask.reshape(m, n // 4, 4)
        most = int(fours.sum(-1).max()) if fours.numel() else 0
        require(most <= 2, "at most 2 of every 4 consecutive weights may be kept", most)
        kept = fours.byte().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
        values = weight.reshape(m, n // 4, 4).gather(-1, kept).view(m, n // 2)
        shifts = torch.arange(0, 8, 2, device=weight.device)
        return {"values": values, "positions": (kept.view(m, n // 8, 4) << shifts).sum(-1).byte()}

    @staticmethod
    def usable(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether there is a kernel for it."""
        if device.type != "cuda" or dtype not in DTYPES:
            return False
        return torch.cuda.get_device_capability(device) >= CAPABILITY

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self._kernel())

    def prepare(self) -> Tensor:
        where, dtype = self.values.device, self.values.dtype
        expectation = "2:4 needs 16-bit weights on a GPU of capability 8.0 or later"
        require(self.usable(where, dtype), expectation, f"{dtype} on {where}")
        return torch.sparse.to_sparse_semi_structured(self.dense())

    @torch.no_grad()
    def dense(self) -> Tensor:
        m, n = self.out_features, self.in_features
        shifts = torch.arange(0, 8, 2, device=self.positions.device)
        kept = (self.positions[..., None].long() >> shifts & 3).view(m, n // 4, 2)
        weight = self.values.new_zeros(m, n // 4, 4)
        return weight.scatter_(-1, kept, self.values.view(m, n // 4, 2)).view(m, n)
