"""Linear layers for inference whose weight has whole blocks of zeros (as BLaST prunes; Okanovic et al. 2025,
arXiv:2507.03117).

    W: m x n in blocks of b x b, of which some are kept                       listed row of blocks by row of blocks
    V: groups x c b x b,  C: groups x c columns of blocks,  R: groups rows of blocks
    y[block row R_g]  +=  x[block columns C_g] V_g                            one batched product, one index_add

A block is stored in x out: one token is then a row vector times a matrix, which reads it in order. Blocks below 32 are
too small for a product of their own with one token, so that c = 32 / b of a row of blocks go together, filled with zero
blocks at the row's end. Products are taken piece by piece, so that what is gathered stays in the cache. What else was
tried (torch's BSR, rows of blocks padded to the longest, a loop over them) is in benchmarks/sparse_layers.py.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...validation import is_whole, require
from .condensed import PIECE, InferenceLinear, is_narrow

SMALLEST = 32  # inputs that a product is worth its call for
TOKENS = 256  # taken at a time


class BlockSparseLinear(InferenceLinear):
    """For inference: the b x b blocks of W that have a place in the mask, each whole (BLaST, arXiv:2507.03117).

    ``from_linear(linear, block=b)``: b divides both sides; 32 to 128 are the fastest.

    Args:
        in_features, out_features, tensors, bias: as for ``InferenceLinear``.

    Raises:
        ValueError: as ``InferenceLinear``, and where b does not divide both sides.

    Example:
        >>> from torch import nn
        >>> from gracile.models.layers import BlockSparseLinear
        >>> linear, x = nn.Linear(128, 64), torch.randn(16, 128)
        >>> _ = linear.weight.data[:, 32:].zero_()  # two blocks of 32 x 32 are left, of eight
        >>> layer = BlockSparseLinear.from_linear(linear, block=32)
        >>> layer.values.numel(), torch.allclose(layer(x), linear(x), atol=1e-5)
        (2048, True)
    """

    form = "blocks"
    places: ClassVar = {"columns": torch.int64, "rows": torch.int64}  # few: of blocks
    columns: Tensor  # groups x c, in blocks
    rows: Tensor  # groups, in blocks

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor, block: int = 64) -> dict[str, Tensor | None]:
        m, n = weight.shape
        require(is_whole(block) and block >= 1, "block must be a whole number >= 1", block)
        require(m % block == 0 and n % block == 0, f"block must divide both sides of {m} x {n}", block)
        kept = mask.reshape(m // block, block, n // block, block).any(3).any(1)
        rows, columns = kept.nonzero(as_tuple=True)
        blocks = weight.reshape(m // block, block, n // block, block).permute(0, 2, 3, 1)[rows, columns]
        c = max(1, SMALLEST // block)
        counts = kept.sum(1)
        groups = (counts + c - 1) // c
        # a block's slot: the groups of earlier rows, then its own number in its row
        first = F.pad(groups.cumsum(0) * c - counts.cumsum(0), (1, 0))[:-1]
        slots = torch.arange(len(rows), device=rows.device) + first[rows]
        total = int(groups.sum())
        values = weight.new_zeros(total * c, block, block).index_copy_(0, slots, blocks)
        places = columns.new_zeros(total * c).index_copy_(0, slots, columns)
        return {
            "values": values.view(total, c * block, block),
            "columns": places.view(total, c),
            "rows": torch.repeat_interleave(torch.arange(len(kept), device=rows.device), groups),
        }

    @property
    def block(self) -> int:
        return self.values.shape[2]

    def forward(self, x: Tensor) -> Tensor:
        made, n = self._made, self.in_features
        # one token of a small layer is some microseconds: the shortest way for it, past all that is not needed
        if made is None or x.numel() != n or x.shape[-1] != n or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        values, columns, rows, groups, height, b = made
        if x.dtype != values.dtype:
            return super().forward(x)
        gathered = x.reshape(-1, b).index_select(0, columns).view(groups, 1, height)
        y = x.new_zeros(self.out_features // b, b).index_add_(0, rows, torch.bmm(gathered, values).view(groups, b))
        bias = self.bias
        return (y.view(-1) if bias is None else y.view(-1) + bias).view(*x.shape[:-1], -1)

    def prepare(self) -> tuple[Tensor, Tensor, Tensor, int, int, int] | None:
        """What a pass of one token reads, at hand."""
        return None if is_narrow(self.values) else (self.values, self.columns.view(-1), self.rows, *self.values.shape)

    def product(self, x: Tensor) -> Tensor:
        self._kernel()
        if is_narrow(x):
            x = x.float()
        return self._product(x) if len(x) <= TOKENS else torch.cat([self._product(part) for part in x.split(TOKENS)])

    def _product(self, x: Tensor) -> Tensor:
        N, values, columns, rows = len(x), self.values, self.columns, self.rows
        b = values.shape[2]
        inputs = x.view(N, -1, b).transpose(0, 1)
        y = x.new_zeros(self.out_features // b, N, b)
        if N > 1 and values.shape[1] > b:  # several tokens are work enough for a block by itself
            rows = rows.repeat_interleave(columns.shape[1])
            values, columns = values.view(-1, b, b), columns.view(-1, 1)
        height = values.shape[1]
        size = max(1, PIECE // (height * max(b, N)))
        for V, C, R in zip(values.split(size), columns.split(size), rows.split(size), strict=True):
            gathered = inputs.index_select(0, C.view(-1)).view(-1, N, height)
            y.index_add_(0, R, torch.bmm(gathered, V.to(x.dtype)))
        return y.transpose(0, 1).reshape(N, -1)

    @torch.no_grad()
    def dense(self) -> Tensor:
        b, c = self.block, self.columns.shape[1]
        m, n = self.out_features // b, self.in_features // b
        blocks = self.values.new_zeros(m * n, b, b)
        places = (self.rows[:, None] * n + self.columns).view(-1)
        blocks.index_add_(0, places, self.values.view(-1, b, b) if c > 1 else self.values)
        return blocks.view(m, n, b, b).permute(0, 3, 1, 2).reshape(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self.block}"
