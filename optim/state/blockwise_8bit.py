"""8-bit state: moments as codes in blocks of 256, through bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861).

A storage type, not a rule: moments are opened to fp32, the rule runs, and they are closed again. The blocks are those
of the whole moment, flattened, also where a process holds a part of it: one that lies in two parts has one scale, the
larger, and the codes are the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import cached_property, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..distributed import FullShard

BLOCK = 256  # elements that share one scale
SMALLEST = 4096  # tensors with fewer elements stay fp32, as in bitsandbytes


class Blocks:
    """The blocks that a process's part of a moment touches: a row of ``per_run`` of them for each run of elements."""

    def __init__(self, shard: FullShard, device: torch.device) -> None:
        self.shard, self.runs, self.device = shard, shard.runs, device
        leads = {self.runs.begin_of(i) % BLOCK for i in range(self.runs.count)}
        self.per_run = -(-(max(leads, default=0) + self.runs.width) // BLOCK) if self.runs.width else 0
        # the same in all runs, so that a view will do; or None
        self.lead = 0 if not self.runs.width else leads.pop() if len(leads) == 1 else None

    @property
    def count(self) -> int:
        return self.runs.count * self.per_run

    @cached_property
    def _begins(self) -> Tensor:
        return torch.arange(self.runs.count, device=self.device).mul_(self.runs.stride).add_(self.runs.begin)[:, None]

    @cached_property
    def _places(self) -> Tensor:
        """Where each element lies in the padded runs."""
        return self._begins % BLOCK + torch.arange(self.runs.width, device=self.device)

    def padded(self, values: Tensor) -> Tensor:
        """``values`` in whole blocks (runs x per_run * 256), zeros where other processes' elements lie."""
        rows = values.reshape(self.runs.count, self.runs.width)
        padded = values.new_zeros(self.runs.count, self.per_run * BLOCK)
        if self.lead is not None:
            padded[:, self.lead : self.lead + self.runs.width] = rows
            return padded
        return padded.scatter_(1, self._places, rows)

    def cut_from(self, padded: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``padded``, in the shape of ``like``."""
        if self.lead is not None:
            return padded[:, self.lead : self.lead + self.runs.width].reshape(like.shape)
        return padded.gather(1, self._places).view(like.shape)

    def fill_(self, padded: Tensor) -> None:
        """Put the largest value that any process has in a block where this one has a gap: bitsandbytes then scales by
        it. Collective."""
        blocks = padded.view(self.runs.count, self.per_run, BLOCK)
        largest = blocks.new_zeros(-(-self.runs.whole // BLOCK))
        if not blocks.numel():
            self.shard.largest_(largest)
            return
        numbers = self._begins // BLOCK + torch.arange(self.per_run, device=self.device)
        numbers.clamp_(max=len(largest) - 1)  # a run that ends early is filled up by blocks of no element
        largest.scatter_reduce_(0, numbers.view(-1), blocks.abs().amax(dim=2).view(-1), "amax")
        scales = self.shard.largest_(largest)[numbers]
        first = self._begins % BLOCK
        begins = torch.arange(self.per_run, device=self.device) * BLOCK
        blocks[:, :, 0] = torch.where(begins < first, scales, blocks[:, :, 0])
        blocks[:, :, -1] = torch.where(begins + BLOCK > first + self.runs.width, scales, blocks[:, :, -1])


def closed_state(moments: Mapping[str, Tensor], shard: FullShard, device: torch.device) -> dict[str, Tensor]:
    """Zeros for moments of the shapes in ``moments``: ``exp_avg`` as uint8 codes, ``exp_avg_absmax`` as fp32 scales."""
    blocks = Blocks(shard, device)
    held: dict[str, Tensor] = {}
    for key, moment in moments.items():
        small = blocks.runs.whole < SMALLEST
        held[key] = torch.zeros(moment.shape, dtype=torch.float32 if small else torch.uint8, device=device)
        if not small:
            held[f"{key}_absmax"] = torch.zeros(blocks.count, dtype=torch.float32, device=device)
    return held


@contextmanager
def opened_moments(state: MutableMapping[str, Tensor], shard: FullShard) -> Iterator[dict[str, Tensor]]:
    """``state`` with its moments in fp32; what they have become is closed at the end. Collective."""
    closed = [key for key in state if f"{key}_absmax" in state]
    wide = {**state, **{key: opened(state, key, shard) for key in closed}}
    yield wide
    for key in closed:
        close(wide.pop(key), state, key, shard)


def require_bitsandbytes() -> None:
    """Raises ImportError where bitsandbytes is not installed, before a run that needs it starts."""
    if find_spec("bitsandbytes") is None:
        raise ImportError("8-bit state needs bitsandbytes; install it with: pip install 'gracile[8bit]'")


@lru_cache(maxsize=16)
def _code(signed: bool, device: torch.device) -> Tensor:
    """The 256 values that codes stand for: more of them near zero."""
    from bitsandbytes.functional import create_dynamic_map  # here: importing it takes a second

    code: Tensor = create_dynamic_map(signed=signed).to(device)  # type: ignore[no-untyped-call]
    return code


def _code_of(key: str, device: torch.device) -> Tensor:
    return _code(not key.endswith("_sq"), device)  # second moments have no sign to keep


def opened(state: Mapping[str, Tensor], key: str, shard: FullShard | None = None) -> Tensor:
    """The moment that ``state`` holds as codes under ``key``, in fp32. Without a shard: all of it."""
    from bitsandbytes.functional import dequantize_blockwise

    codes, absmax = state[key], state[f"{key}_absmax"]
    if not codes.numel():
        return codes.float()
    blocks = Blocks(shard, codes.device) if shard is not None and shard.split else None
    padded = codes if blocks is None else blocks.padded(codes)
    values: Tensor = dequantize_blockwise(padded, absmax=absmax, code=_code_of(key, codes.device), blocksize=BLOCK)
    return values if blocks is None else blocks.cut_from(values, codes)


def close(values: Tensor, state: MutableMapping[str, Tensor], key: str, shard: FullShard) -> None:
    """Write ``values`` (fp32) into ``state`` as codes under ``key``. Collective."""
    from bitsandbytes.functional import quantize_blockwise

    blocks = Blocks(shard, values.device) if shard.split else None
    if blocks is not None:
        values = blocks.padded(values)
        blocks.fill_(values)
    if not values.numel():
        return
    codes, scales = quantize_blockwise(values, code=_code_of(key, values.device), blocksize=BLOCK)
    state[key].copy_(codes if blocks is None else blocks.cut_from(codes, state[key]))
    state[f"{key}_absmax"].copy_(scales.absmax)
