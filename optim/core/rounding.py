"""Weights and moments in bf16 that lose nothing on average: a step computes in fp32, and rounds up or down by chance.

    w   =  what a step makes of W, in fp32, decay included
    f   =  the low 16 bits of w
    u   =  16 bits of hash(seed, parameter, step, tensor, place)            uniform
    W  <-  the high 16 bits of w + u            away from zero with probability f / 65536, so that the mean of W is w

Rounded to nearest, a bf16 weight keeps nothing of an update below 2^-9 of its size, and a second moment cannot decay at
b2 = 0.999, since 0.1 percent is less than half a step of bf16 (Ozkara et al. 2025, arXiv:2502.20566, for weights).

The noise is a function of a tensor's place in the whole parameter, not of a generator: replicas, parts of any layout
and a resumed run draw the same. What bf16 holds exactly never changes, zeros neither; what is not finite stays as it
is, and nothing finite becomes infinite.

Weights in 8 bits (``int8_weight.py``) are widened likewise for every step, and written back by the same noise, or to
nearest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...int8_weight import Int8Weight, open_weight, write
from ..distributed import Block, FullShard, MatrixShard, Runs, at_once, is_large, spans
from ..state.spec import ERRORS, MOMENTS, Placement, StateSpec
from .clock import steps_of
from .types import Group, State

LARGEST = 0x7F7F0000  # the largest bf16, as the bits of an fp32
INFINITE = 0x7F800000
ROOTS = (0x3504F333, 0x5DB3D743, 0x478DDE6F)  # of 2, 3 and 5: odd, and otherwise of no pattern
WEIGHTS = "weights"  # the name of the parameter among its tensors

Key = tuple[int | Tensor, int | Tensor]  # words of 32 bits
Places = Callable[[int, int], Tensor]  # of elements from .. to of a flat tensor, their places in the whole (int32)


def is_rounded(spec: StateSpec) -> bool:
    """Whether a tensor of state takes up small increments, in bf16."""
    return spec.dtype == torch.bfloat16 and spec.kind in (MOMENTS, ERRORS)


@contextmanager
def widened(
    shard: FullShard, state: State, specs: Iterable[StateSpec], group: Group, in_blocks: bool = False
) -> Iterator[State]:
    """Weights and state in fp32 for a step of one parameter; what they have become is rounded at the end. With
    ``in_blocks`` weights of a large matrix are wider in blocks, as ``FullShard.write`` writes them."""
    seen = {**state, **{spec.name: state[spec.name].float() for spec in specs}}
    by_blocks = in_blocks and not shard.split and shard.parameter.dim() > 1 and is_large(shard.shape)
    with (rounded_blocks if by_blocks else widened_weights)(shard, state, group):
        yield seen
    for spec in specs:
        key = _key(group, shard, state, spec.name)
        round_(state[spec.name], seen[spec.name], key, _places(spec, shard, state))


@contextmanager
def widened_weights(shard: FullShard, state: State, group: Group, what: str = WEIGHTS) -> Iterator[None]:
    """Weights in fp32, where they are bf16; ``what`` tells two such passes of one step apart."""
    if not _is_narrow(shard):
        yield
        return
    with shard.in_place_of_weights(open_weight(shard.parameter.detach(), torch.float32)) as (narrow, wide):
        yield
    write_back(narrow, wide, _key_of_weights(group, shard, state, what), _from(shard.first_element, narrow.device))


@contextmanager
def rounded_blocks(shard: FullShard, state: State, group: Group) -> Iterator[None]:
    """Weights that are rounded, where they are bf16, as they are written: in fp32 is never more than a block."""
    if not _is_narrow(shard):
        yield
        return
    key, n = _key_of_weights(group, shard, state, WEIGHTS), shard.parameter[0].numel()

    def round_block(wide: Tensor, block: Block) -> None:
        places = _from(shard.first_element + block.begin * n, wide.device)
        if block.axis:
            whole = shard.parameter.numel()
            places = _in_runs(Runs(len(shard.parameter), block.length, block.begin, n, whole), wide.device)
        write_back(block.of(shard.parameter), wide, key, places)

    def round_places(narrow: Tensor, wide: Tensor, at: Tensor) -> None:
        first = _signed(shard.first_element)
        write_back(narrow, wide, key, lambda begin, end: at[begin:end] + first)

    shard.round_block, shard.round_places = round_block, round_places
    try:
        yield
    finally:
        shard.round_block = shard.round_places = None


def _is_narrow(shard: FullShard) -> bool:
    """Whether weights are rounded in a step: bf16, or in 8 bits."""
    return shard.dtype == torch.bfloat16 or isinstance(shard.parameter, Int8Weight)


def write_back(narrow: Tensor, wide: Tensor, key: Key | None, places: Places) -> None:
    """narrow <- wide, as ``round_``; weights in 8 bits also to nearest, without a key."""
    if isinstance(narrow, Int8Weight):
        write(narrow, wide, None if key is None else lambda begin, end: noise(places(begin, end), key))
    else:
        assert key is not None, "of bf16 nothing is widened without one"
        round_(narrow, wide, key, places)


def round_(narrow: Tensor, wide: Tensor, key: Key, places: Places) -> None:
    """narrow (bf16) <- wide (fp32), of one shape, rounded by the noise of ``key`` at the places of their elements."""
    flat = wide.reshape(-1)  # in the order of the elements, which a transposed weight has otherwise in memory
    rounded = narrow.view(-1) if narrow.is_contiguous() else torch.empty_like(flat, dtype=narrow.dtype)
    size = at_once(flat.device) // (2 if flat.device.type == "cpu" else 8)  # the noise takes four times as much memory
    for part in spans(len(flat), size):
        rounded[part] = _rounded(flat[part], noise(places(part.start, part.stop), key))
    if not narrow.is_contiguous():
        narrow.copy_(rounded.view(narrow.shape))


def _rounded(wide: Tensor, noise: Tensor) -> Tensor:
    bits = wide.view(torch.int32)
    size = bits & 0x7FFFFFFF
    low = torch.where(size <= LARGEST, noise, LARGEST - size)  # what is larger than the largest becomes it
    rounded = (bits + low).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(size < INFINITE, rounded, wide).to(torch.bfloat16)


def noise(places: Tensor, key: Key) -> Tensor:
    """16 uniform bits (int32) for each place: three rounds of multiplying and mixing, two of which would leave none of
    the correlations between neighbours, seeds and steps that one leaves."""
    first, second = key
    mixed = _mix(places ^ first, ROOTS[0])
    mixed = _mix(mixed.bitwise_xor_(second), ROOTS[1])
    return _mix(mixed.add_(first), ROOTS[2]).bitwise_and_(0xFFFF)


def _mix(x: Tensor, factor: int) -> Tensor:
    """Of int32, whose products wrap; the shifts take zeros in."""
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(factor)
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))


def _key_of_weights(group: Group, shard: FullShard, state: State, what: str) -> Key | None:
    """As ``_key``; None where weights in 8 bits are rounded to nearest."""
    if isinstance(shard.parameter, Int8Weight) and not group["stochastic_rounding"]:
        return None
    return _key(group, shard, state, what)


def _key(group: Group, shard: FullShard, state: State, what: str) -> Key:
    """Two words for a tensor in a step. Where a graph counts the steps, they are made on the device, and are others."""
    seed, position = group["rounding_seed"], shard.position
    if not group.get("capturable"):
        return _words(f"{seed} {position} {steps_of(state)} {what}")
    first, second = _words(f"{seed} {position} {what}")
    t = state["step"].to(torch.int32)
    return _word_of(t, first, second), _word_of(t, second, first)


def _word_of(t: Tensor, first: int, second: int) -> Tensor:
    mixed = _mix(t.bitwise_xor(first), ROOTS[0])
    return _mix(mixed.bitwise_xor_(second), ROOTS[1])


def _words(told: str) -> tuple[int, int]:
    digest = hashlib.sha256(told.encode()).digest()
    return _signed(int.from_bytes(digest[:4], "little")), _signed(int.from_bytes(digest[4:8], "little"))


def _signed(word: int) -> int:
    """A number of 32 bits as int32 has it."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


# ---- places ---------------------------------------------------------------------------------------------------------


def _from(first: int, device: torch.device) -> Places:
    """Places one after the other."""
    return lambda begin, end: torch.arange(end - begin, dtype=torch.int32, device=device).add_(_signed(first + begin))


def _in_runs(runs: Runs, device: torch.device) -> Places:
    if runs.count == 1:
        return _from(runs.begin, device)

    def places(begin: int, end: int) -> Tensor:
        at = torch.arange(begin, end, device=device)
        found = at.div(runs.width, rounding_mode="floor").mul_(runs.stride - runs.width).add_(at).add_(runs.begin)
        return found.add_(2**31).remainder_(2**32).sub_(2**31).to(torch.int32)

    return places


def _places(spec: StateSpec, shard: FullShard, state: State) -> Places:
    """Where the elements of a tensor of state, as they are held, lie in all of it."""
    held = state[spec.name]
    if spec.placement is Placement.ELEMENTS:
        if "indices" in state and len(state["indices"]) == held.numel():  # packed by a mask
            first = _signed(shard.first_element)
            return lambda begin, end: state["indices"][begin:end] + first
        return _from(shard.first_element, held.device)
    if spec.placement is Placement.LINES and isinstance(shard, MatrixShard):
        first, last = shard.lines
        rows, row = math.prod(spec.shape[: spec.axis]), math.prod(spec.shape[spec.axis + 1 :])
        whole = spec.shape[spec.axis] * row
        return _in_runs(Runs(rows, (last - first) * row, first * row, whole, rows * whole), held.device)
    return _from(0, held.device)
