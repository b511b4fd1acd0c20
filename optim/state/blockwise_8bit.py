"""8-bit state: moments as codes in blocks of 256, through bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861).

A storage type, not a rule: moments are dequantized to fp32, updated, and quantized again. The blocks are those
of the whole moment, flattened, also where a process holds a part of it: one that lies in two parts has one scale, the
larger, and the codes are the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..distributed import FullShard, MadeOnce
from .spec import Codec, HeldTensor, State, StateSpec

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
            self.shard.all_reduce_max_(largest)
            return
        numbers = self._begins // BLOCK + torch.arange(self.per_run, device=self.device)
        numbers.clamp_(max=len(largest) - 1)  # a run that ends early is filled up by blocks of no element
        largest.scatter_reduce_(0, numbers.view(-1), blocks.abs().amax(dim=2).view(-1), "amax")
        scales = self.shard.all_reduce_max_(largest)[numbers]
        first = self._begins % BLOCK
        begins = torch.arange(self.per_run, device=self.device) * BLOCK
        blocks[:, :, 0] = torch.where(begins < first, scales, blocks[:, :, 0])
        blocks[:, :, -1] = torch.where(begins + BLOCK > first + self.runs.width, scales, blocks[:, :, -1])


def require_bitsandbytes() -> None:
    """Raises ImportError where bitsandbytes is not installed, before a run that needs it starts."""
    if find_spec("bitsandbytes") is None:
        raise ImportError("8-bit state needs bitsandbytes; install it with: pip install 'gracile[8bit]'")


@MadeOnce
def _code(signed: bool, device: torch.device) -> Tensor:
    """The 256 values that codes stand for: more of them near zero."""
    from bitsandbytes.functional import create_dynamic_map  # here: importing it takes a second

    code: Tensor = create_dynamic_map(signed=signed).to(device)  # type: ignore[no-untyped-call]
    return code


def code_of(key: str, device: torch.device) -> Tensor:
    """What the codes of a moment stand for."""
    return _code(not key.endswith("_sq"), device)  # second moments have no sign to keep


class Blockwise8bit(Codec):
    """Moments as uint8 codes, and an fp32 scale a block under the key with ``_absmax`` behind it. Small ones stay fp32.

    ``encode`` is collective.
    """

    def held(self, spec: StateSpec, shard: FullShard) -> list[HeldTensor]:
        shape = spec.local_shape(shard)
        if math.prod(spec.shape) < SMALLEST:
            return [HeldTensor(spec.name, shape, torch.float32, spec.kind)]
        scales = HeldTensor(scales_key(spec.name), (Blocks(shard, shard.device).count,), torch.float32, spec.kind)
        return [HeldTensor(spec.name, shape, torch.uint8, spec.kind), scales]

    def is_held(self, spec: StateSpec, saved: Mapping[str, Any]) -> bool:
        return scales_key(spec.name) in saved

    def decode(self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor]) -> Tensor:
        return held[spec.name] if math.prod(spec.shape) < SMALLEST else dequantize(held, spec.name, shard)

    def piece(
        self, spec: StateSpec, shard: FullShard, held: Mapping[str, Tensor], begin: int, end: int
    ) -> dict[str, Tensor]:
        values = super().piece(spec, shard, held, begin, end)
        if math.prod(spec.shape) < SMALLEST:
            return values
        whole = shard.first_element // BLOCK
        first, last = (shard.first_element + begin) // BLOCK, -(-(shard.first_element + end) // BLOCK)
        key = scales_key(spec.name)
        return {**values, key: held[key][first - whole : last - whole]}

    def encode(self, value: Tensor, spec: StateSpec, shard: FullShard, held: State) -> None:
        if spec.name not in held:
            held.update(self.new(spec, shard))
        if math.prod(spec.shape) < SMALLEST:
            held[spec.name].copy_(value)
        else:
            quantize_(value.to(shard.device).contiguous(), held, spec.name, shard)


IN_8_BITS = Blockwise8bit()


def scales_key(name: str) -> str:
    return f"{name}_absmax"


def without_codes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The saved state of a whole parameter with its moments in fp32."""
    scales = {scales_key(name) for name in state} & set(state)
    return {
        name: dequantize(state, name) if scales_key(name) in scales else value
        for name, value in state.items()
        if name not in scales
    }


def of_bitsandbytes(spec: StateSpec, number: str, theirs: MutableMapping[str, Any]) -> dict[str, Tensor]:
    """A moment that an optimizer of bitsandbytes keeps as ``state1`` or ``state2``, under its keys here.

    Args:
        spec: the moment of the whole parameter.
        number: 1 or 2.
        theirs: the state, of which what belongs to the moment is taken away.

    Raises:
        ValueError: for codes that stand for other numbers here.
    """
    codes, scales, values = (theirs.pop(f"{key}{number}", None) for key in ("state", "absmax", "qmap"))
    size = math.prod(spec.shape)
    form, expected = getattr(codes, "dtype", None), torch.float32 if size < SMALLEST else torch.uint8
    if form != expected:
        raise ValueError(
            f"state{number} of {size} elements must be {expected}, got {form}: min_8bit_size is {SMALLEST}"
        )
    if size < SMALLEST:
        return {spec.name: codes}
    if not isinstance(scales, Tensor) or len(scales) != -(-size // BLOCK):
        raise ValueError(f"absmax{number} must hold a scale for each block of {BLOCK} of {size} elements")
    if not isinstance(values, Tensor) or not torch.equal(values.cpu(), code_of(spec.name, torch.device("cpu"))):
        raise ValueError(f"qmap{number} must be the dynamic map of bitsandbytes; its codes stand for other numbers")
    return {spec.name: codes, scales_key(spec.name): scales}


def dequantize(state: Mapping[str, Tensor], key: str, shard: FullShard | None = None) -> Tensor:
    """The moment that ``state`` holds as codes under ``key``, in fp32. Without a shard: all of it."""
    from bitsandbytes.functional import dequantize_blockwise

    codes, absmax = state[key], state[scales_key(key)]
    if absmax.dim() > 1 and codes[0].numel() % BLOCK:  # of experts whose blocks end where they do: no one row of blocks
        experts = zip(codes, absmax, strict=True)
        return torch.stack([dequantize({key: own, scales_key(key): scales}, key) for own, scales in experts])
    if not codes.numel():
        return codes.float()
    blocks = Blocks(shard, codes.device) if shard is not None and shard.split else None
    padded = codes if blocks is None else blocks.padded(codes)
    code = code_of(key, codes.device)
    values: Tensor = dequantize_blockwise(padded, absmax=absmax.view(-1), code=code, blocksize=BLOCK)
    return values if blocks is None else blocks.cut_from(values, codes)


def move_codes(
    W: Tensor,
    G: Tensor,
    state: Mapping[str, Tensor],
    keys: tuple[str, str],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """A step of Adam on ``W`` by the kernel of bitsandbytes, which reads and writes the codes of both moments."""
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    M, V = keys
    scales = [state[scales_key(key)].view(-1) for key in keys]  # of a stack, B x blocks of each
    update: Any = optimizer_update_8bit_blockwise
    codes = (code_of(key, W.device) for key in keys)
    update("adam", G, W, state[M], state[V], *betas, 0.0, 0.0, eps, step, lr, *codes, *scales)


def quantize_(values: Tensor, state: State, key: str, shard: FullShard) -> None:
    """Write ``values`` (fp32) into ``state`` as codes under ``key``. Collective."""
    from bitsandbytes.functional import quantize_blockwise

    blocks = Blocks(shard, values.device) if shard.split else None
    if blocks is not None:
        values = blocks.padded(values)
        blocks.fill_(values)
    if not values.numel():
        return
    codes, scales = quantize_blockwise(values, code=code_of(key, values.device), blocksize=BLOCK)
    state[key].copy_(codes if blocks is None else blocks.cut_from(codes, state[key]))
    state[scales_key(key)].copy_(scales.absmax.view_as(state[scales_key(key)]))
