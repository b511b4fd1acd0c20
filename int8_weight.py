"""Weights in 8 bits: codes of -127 .. 127 and a scale for each group of a row, in a tensor that looks like a float one.

    W[i, j]  =  codes[i, j] * scales[i, j // g]            g = 256; the last group of a row may be shorter

A scale is chosen once, with room above the group's largest weight, and then kept: while the largest stays in place,
what does not move is written back as the codes it was read from. Where it outgrows the codes, or falls below 45 percent
of them, the scale changes by a power of two. A scale has 16 significant bits, so that a code times it is exact in fp32.
(Scales found anew in every step, as in Q-GaLore, arXiv:2407.08296, and torchao, round all weights anew each time, and
those that do not move wander.)

Rounded to nearest, a weight keeps nothing of an update below half a step of its grid; rounded by chance, the mean is
right. The noise is the caller's. What is not finite has no code: its group's scale becomes NaN, and all that is read of
the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

from .validation import is_whole, require

GROUP = 256
MOST = 127  # the largest code
FIRST = 100  # the code of a group's largest weight at first: it may grow by a quarter before the grid gets coarser
SHRUNK = 0.45  # of the largest code, below which the grid gets finer: not 0.5, or a weight at that edge would move it
# in every other step
SMALLEST = 2.0**-100  # scale
ON_CPU, ELSEWHERE = 2**18, 2**22  # elements that are worked on at a time

Noise = Callable[[int, int], Tensor]  # of elements from .. to of a weight, 16 uniform bits for each (int32)
# DistributedDataParallel makes all processes equal by sending opened weights: those that are equal already stay as they
# are, others would be rounded on each process by scales of its own.
NOT_SENT = (
    "ordinary weights were copied onto other ones in 8 bits, in a run of several processes: DistributedDataParallel "
    "does so where processes begin with different weights; give all the same seed or checkpoint before quantize_weights"
)
aten = torch.ops.aten


class Int8Weight(Tensor):
    """A matrix (m, n) in 8 bits that looks like one of ``dtype``; also whole rows of one, laid out flat.

    Operations see it opened, and what torch writes to it in place is rounded to nearest; those that only look at some
    rows, copy or move it keep codes and scales.

    Args:
        codes: int8, (m, n), or flat.
        scales: fp32, (m, n / group_size), rounded up.
        dtype: that it is opened in.
        group_size: weights of a row that share a scale.
        columns: n.
    """

    codes: Tensor
    scales: Tensor
    group_size: int
    columns: int
    part_of: tuple[int, int] | None = None  # of a part that FSDP2 made: the rows of all, and of the largest part

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype, group_size: int, columns: int) -> Int8Weight:
        made: Int8Weight = Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device
        )
        return made

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, group_size: int, columns: int) -> None:
        self.codes, self.scales, self.group_size, self.columns = codes, scales, group_size, columns

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, dtype={self.dtype}, group_size={self.group_size})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scales"], (self.dtype, self.group_size, self.columns, self.part_of)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], told: Any, size: Any = None, stride: Any = None) -> Int8Weight:
        made = Int8Weight(parts["codes"], parts["scales"], *told[:3])
        made.part_of = told[3]
        return made

    @property
    def stored_bytes(self) -> int:
        """Of codes and scales; ``nbytes`` is of what it looks like."""
        return self.codes.nbytes + self.scales.nbytes

    def like(self, codes: Tensor, scales: Tensor, dtype: torch.dtype | None = None) -> Int8Weight:
        """Other codes and scales of rows as long."""
        made = Int8Weight(codes, scales, dtype or self.dtype, self.group_size, self.columns)
        made.part_of = self.part_of
        return made

    def open(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights as an ordinary tensor."""
        return opened(self.codes, self.scales, self.group_size, self.columns, dtype or self.dtype)

    # ---- FSDP2: codes and scales are sent -------------------------------------------------------------------------

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """All parts as long as the largest. (With the longer signature torch wants all of them in one shape.)"""
        rows, share = self.part_of or (len(self) * mesh.size(), len(self))
        missing = share - len(self)
        if not missing:
            return (self.codes, self.scales), rows
        codes, scales = (torch.cat([t, t.new_zeros(missing, t.shape[1])]) for t in (self.codes, self.scales))
        return (codes, scales), rows

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], told: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        if out is not None:
            return None
        codes, scales = gathered
        return Int8Weight(codes[:told], scales[:told], param_dtype, self.group_size, self.columns), gathered

    # ---- torch's operations -----------------------------------------------------------------------------------------

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        own = args[0] if args else None
        if isinstance(own, cls) and func in _KEPT:
            kept = _KEPT[func](own, func, args[1:], kwargs)
            if kept is not None:
                return return_and_correct_aliasing(func, args, kwargs, kept) if func in _ALIASES else kept
        if isinstance(own, cls) and func._schema.is_mutable and func._schema.name.endswith("_"):
            wide = own.open(torch.float32)
            func(wide, *_opened_each(args[1:]), **_opened_each(kwargs))
            write(own, wide)
            return own
        return func(*_opened_each(args), **_opened_each(kwargs))


def _opened_each(given: Any) -> Any:
    return tree_map(lambda one: one.open() if isinstance(one, Int8Weight) else one, given)


def _copied(own: Int8Weight, func: Any, rest: Any, kwargs: Any) -> Tensor:
    return own.like(func(own.codes, *rest, **kwargs), func(own.scales, *rest, **kwargs))


def _rows_of(own: Int8Weight, begin: int, end: int) -> Int8Weight | None:
    """Elements of a flat one, or rows, where they are whole rows."""
    n = own.columns if own.dim() == 1 else 1
    if begin % n or end % n:
        return None
    return own.like(own.codes[begin:end], own.scales[begin // n : end // n])


def _sliced(own: Int8Weight, func: Any, rest: Any, kwargs: Any) -> Tensor | None:
    given: list[Any] = list(rest)
    dim, begin, end, step = given + [0, None, None, 1][len(given) :]
    begin, end, _ = slice(begin, end).indices(own.shape[dim])
    end = max(begin, end)
    if step != 1:
        return None
    if dim in (0, -own.dim()):
        return _rows_of(own, begin, end)
    if begin % own.group_size:
        return None
    scales = own.scales[:, begin // own.group_size : -(-end // own.group_size)]
    return Int8Weight(own.codes[:, begin:end], scales, own.dtype, own.group_size, end - begin)


def _selected(own: Int8Weight, func: Any, rest: Any, kwargs: Any) -> Tensor | None:
    dim, index = rest
    if own.dim() != 2 or dim not in (0, -2):
        return None
    index %= len(own)
    return own.like(own.codes[index : index + 1], own.scales[index : index + 1]).open()[0]


def _split(own: Int8Weight, func: Any, rest: Any, kwargs: Any) -> Any:
    given: list[Any] = list(rest)
    size, dim = given + [0][len(given) - 1 :]
    if dim != 0:
        return None
    parts = [_rows_of(own, begin, min(begin + size, len(own))) for begin in range(0, len(own), size)]
    return None if None in parts else parts


def _viewed(own: Int8Weight, func: Any, rest: Any, kwargs: Any) -> Tensor | None:
    shape = list(rest[0])
    if -1 in shape:
        shape = list(torch.empty(own.shape, device="meta").view(shape).shape)
    if tuple(shape) in (tuple(own.shape), (own.numel(),)) or (len(shape) == 2 and shape[1] == own.columns):
        return own.like(own.codes.view(shape), own.scales)
    return None


def _strided(own: Int8Weight, func: Any, rest: Any, kwargs: Any) -> Tensor | None:
    same = tuple(rest[0]) == tuple(own.shape) and tuple(rest[1]) == own.stride()
    return own.like(own.codes, own.scales) if same else None


def _zeros(own: Int8Weight, func: Any, rest: Any, kwargs: Any) -> Tensor | None:
    """Rows as long as its own are such a weight again, which is what FSDP2 pads; what is new otherwise is ordinary."""
    shape = tuple(rest[0])
    if len(shape) != 2 or shape[1] != own.columns:
        return None
    scales = own.scales.new_ones(shape[0], own.scales.shape[1])
    made = own.like(own.codes.new_zeros(shape), scales)
    made.part_of = own.part_of or (len(own), shape[0])
    return made


def _like(own: Int8Weight, func: Any, rest: Any, kwargs: Any) -> Tensor:
    """An ordinary tensor, as the moments of an optimizer are."""
    kwargs = {**kwargs, "dtype": kwargs.get("dtype") or own.dtype}
    made: Tensor = func(own.codes, *rest, **kwargs)
    return made


def _converted(own: Int8Weight, func: Any, rest: Any, kwargs: Any) -> Tensor | None:
    dtype = kwargs.pop("dtype", None) or own.dtype
    if not dtype.is_floating_point:
        kwargs["dtype"] = dtype
        return None
    return own.like(func(own.codes, **kwargs), func(own.scales, **kwargs), dtype)


def _overwritten(own: Int8Weight, func: Any, rest: Any, kwargs: Any) -> Tensor:
    other = rest[0]
    if isinstance(other, Int8Weight) and (own.group_size, own.shape) == (other.group_size, other.shape):
        own.codes.copy_(other.codes)
        own.scales.copy_(other.scales)
        return own
    whole = (other.open(torch.float32) if isinstance(other, Int8Weight) else other).expand(own.shape)
    if not _holds(own, whole):
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(NOT_SENT)
        lined = whole.reshape(-1, own.columns)
        own.scales.copy_(_first_scales(lined, own.group_size))
        write(own, whole.to(torch.float32))
    return own


def _holds(own: Int8Weight, given: Tensor) -> bool:
    """Whether ``given`` is what codes and scales open to: then they stay, and nothing is rounded."""
    codes, given = (t.reshape(-1, own.columns) for t in (own.codes, given))
    if given.device.type == "meta" or given.dtype != own.dtype:
        return False
    return all(
        torch.equal(_times(codes[rows], own.scales[rows], own.group_size).to(own.dtype), given[rows])
        for rows in row_spans(codes)
    )


_KEPT = {
    aten.detach.default: _copied,
    aten.alias.default: _copied,
    aten.clone.default: _copied,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.split.Tensor: _split,
    aten.view.default: _viewed,
    aten.as_strided.default: _strided,
    aten.new_zeros.default: _zeros,
    aten.zeros_like.default: _like,
    aten.empty_like.default: _like,
    aten.ones_like.default: _like,
    aten._to_copy.default: _converted,
    aten.copy_.default: _overwritten,
}
_ALIASES = {aten.detach.default, aten.alias.default, aten.view.default, aten.copy_.default}


# ---- reading and writing --------------------------------------------------------------------------------------------


def is_int8(tensor: Tensor) -> bool:
    """Whether a tensor, or this process's part of a DTensor, holds weights in 8 bits."""
    return isinstance(getattr(tensor, "_local_tensor", tensor), Int8Weight)


def open_weight(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as an ordinary one, of ``dtype`` where it is given."""
    if isinstance(tensor, Int8Weight):
        return tensor.open(dtype)
    return tensor if dtype is None else tensor.to(dtype)


def memory_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that have a tensor's memory: codes and scales of weights in 8 bits."""
    return [tensor.codes, tensor.scales] if isinstance(tensor, Int8Weight) else [tensor]


@torch.no_grad()
def quantize(weight: Tensor, group_size: int = GROUP) -> Int8Weight:
    """A float matrix (m, n) in 8 bits, rounded to nearest.

    Args:
        weight: of fp32, bf16, fp16 or fp64.
        group_size: weights of a row that share a scale.

    Raises:
        ValueError: for what is no matrix, or a group size below 1.
    """
    require(is_whole(group_size) and group_size >= 1, "group_size must be a whole number >= 1", group_size)
    require(weight.dim() == 2, "weights in 8 bits must be matrices (m, n), got the shape", tuple(weight.shape))
    made = without_values(tuple(weight.shape), weight.dtype, weight.device, group_size)
    if weight.is_meta:
        return made
    for rows in row_spans(weight):
        wide = weight[rows].detach().float()
        made.scales[rows] = _first_scales(wide, group_size)
        write(made.like(made.codes[rows], made.scales[rows]), wide)
    return made


def without_values(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, group_size: int = GROUP
) -> Int8Weight:
    """Memory for weights in 8 bits."""
    m, n = shape
    codes = torch.empty(shape, dtype=torch.int8, device=device)
    scales = torch.empty(m, -(-n // group_size), dtype=torch.float32, device=device)
    return Int8Weight(codes, scales, dtype, group_size, n)


def opened(codes: Tensor, scales: Tensor, group_size: int, columns: int, dtype: torch.dtype) -> Tensor:
    """codes * scales in ``dtype``, rounded once, and laid out as ``codes``; wider is never more than some rows."""
    lined = codes.view(-1, columns) if codes.dim() == 1 else codes
    if torch.compiler.is_compiling():
        return _times(lined, scales, group_size).to(dtype).view(codes.shape)
    values = torch.empty(lined.shape, dtype=dtype, device=codes.device)
    for rows in row_spans(lined):
        values[rows] = _times(lined[rows], scales[rows], group_size)
    return values.view(codes.shape)


@torch.no_grad()
def write(weight: Int8Weight, wide: Tensor, noise: Noise | None = None) -> None:
    """weight <- wide (fp32, of its shape), rounded by ``noise``, or to nearest without it."""
    n, g = weight.columns, weight.group_size
    codes, wide = (t.view(-1, n) if t.dim() == 1 else t for t in (weight.codes, wide))
    for rows in row_spans(codes):
        own = wide[rows]
        scales = _fitting(_largest(own, g), weight.scales[rows])
        steps = own / _spread(scales, own.shape[1], g)
        if noise is None:
            steps = steps.round_()
        else:
            drawn = noise(rows.start * n, rows.start * n + own.numel()).view(own.shape)
            steps = steps.add_(drawn.to(torch.float32).add_(0.5).mul_(2.0**-16)).floor_()
        codes[rows] = steps.clamp_(-MOST, MOST).nan_to_num_(nan=0.0)
        weight.scales[rows] = scales


def row_spans(matrix: Tensor) -> Iterator[slice]:
    """Rows of a matrix that are worked on at a time."""
    (rows, columns), device = matrix.shape, matrix.device
    if torch.compiler.is_compiling():
        yield slice(0, rows)
        return
    length = max(1, (ON_CPU if device.type == "cpu" else ELSEWHERE) // max(1, columns))
    for begin in range(0, rows, length):
        yield slice(begin, min(begin + length, rows))


def _spread(scales: Tensor, columns: int, group_size: int) -> Tensor:
    """The scale of each weight, or one for all of a row."""
    if scales.shape[1] == 1:
        return scales
    return scales.repeat_interleave(group_size, 1)[:, :columns]


def _times(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    n = codes.shape[1]
    if n % group_size:
        return codes * _spread(scales, n, group_size)
    return (codes.unflatten(1, (-1, group_size)) * scales.unsqueeze(2)).flatten(1)


def _largest(wide: Tensor, group_size: int) -> Tensor:
    """The largest |w| of each group; NaN of one that has a NaN."""
    n = wide.shape[1]
    whole = n - n % group_size
    parts = []
    if whole:
        parts.append(torch.linalg.vector_norm(wide[:, :whole].unflatten(1, (-1, group_size)), ord=torch.inf, dim=2))
    if whole < n:
        parts.append(torch.linalg.vector_norm(wide[:, whole:], ord=torch.inf, dim=1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _first_scales(wide: Tensor, group_size: int) -> Tensor:
    """Of new weights: their largest is the code ``FIRST``, but for the bits that a scale has."""
    largest = _largest(wide.float(), group_size)
    scales = torch.where(largest > 0, largest / FIRST, 1.0).clamp_(min=SMALLEST)
    return torch.where(largest.isfinite(), _cut(scales), torch.nan)


def _cut(scales: Tensor) -> Tensor:
    """Of positive numbers, the 16 leading bits: 7 of a code and 16 fit into the 24 of fp32."""
    return (scales.view(torch.int32) & -0x100).view(torch.float32)


def _fitting(largest: Tensor, scales: Tensor) -> Tensor:
    """The scales, those by a power of two larger or smaller whose groups have outgrown or lost their codes."""
    share = largest / (scales * MOST)
    _, power = torch.frexp(share)  # share <= 2^power, and 2^(power - 1) of a power of two itself
    power = power - (share.view(torch.int32) & 0x7FFFFF == 0).to(power.dtype)
    keep = (share <= 1) & (share >= SHRUNK) | (largest == 0)
    power = torch.where(keep, 0, power).clamp_(-250, 250)
    half = power.div(2, rounding_mode="floor")
    changed = (scales * _power_of_two(half) * _power_of_two(power - half)).clamp(min=SMALLEST)
    return torch.where(largest.isfinite() & changed.isfinite(), changed, torch.nan)


def _power_of_two(power: Tensor) -> Tensor:
    return ((power.to(torch.int32) + 127) << 23).view(torch.float32)
