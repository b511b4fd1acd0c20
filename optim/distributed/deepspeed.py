"""DeepSpeed's private layout: where the parameters of ZeRO 1, 2 and 3 lie in the flat tensors that it steps.

Its attributes are private. They are read here alone, and what is read is compared with the weights themselves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .layout import ParamRef, UnsupportedLayout
from .process_group import ProcessGroup
from .shard_range import ShardRange


def zero_ranges(flat: Tensor, refs: list[ParamRef]) -> list[tuple[ParamRef, ShardRange]]:
    """The refs of one group that lie in DeepSpeed's flat partition ``flat``, in the same order on every process.

    Raises:
        UnsupportedLayout: for a flat tensor of another origin, or a DeepSpeed whose layout is not what it was.
    """
    if not refs:
        raise UnsupportedLayout(f"a group holds a tensor of shape {tuple(flat.shape)} that the optimizer was not given")
    try:
        first = refs[0].parameter
        return _zero3(flat, refs) if hasattr(first, "ds_id") else _zero12(flat, refs)
    except (AttributeError, StopIteration, KeyError, IndexError) as error:
        raise UnsupportedLayout(
            f"a parameter of shape {refs[0].shape} was replaced by a tensor of shape {tuple(flat.shape)}, but not "
            f"as DeepSpeed ZeRO 1, 2 or 3 does it ({type(error).__name__}: {error}); known to work: DeepSpeed 0.19, "
            "in 16 bits from stage 1 on"
        ) from None


def zero3_flat_tensors(refs: list[ParamRef]) -> list[Tensor]:
    """DeepSpeed ZeRO 3's flat partitions of one group, which it shows to the optimizer during ``step`` alone."""
    engine: Any = getattr(refs[0].parameter, "_z3_optimizer", None) if refs else None
    if engine is None:
        return []
    ours = {id(ref.parameter) for ref in refs}
    parts = zip(engine.fp32_partitioned_groups_flat, engine.fp16_groups, strict=True)
    return [flat for flat, stepped in parts if id(stepped[0]) in ours]


def _zero3(flat: Tensor, refs: list[ParamRef]) -> list[tuple[ParamRef, ShardRange]]:
    """Each parameter is cut by itself, into equal parts, the last ones short or empty."""
    engine: Any = refs[0].parameter._z3_optimizer  # type: ignore[attr-defined]
    number = next(i for i, other in enumerate(engine.fp32_partitioned_groups_flat) if other is flat)
    processes = ProcessGroup.for_tensors_on(flat.device, engine.sub_group_process_groups[number])
    by_id = {id(ref.parameter): ref for ref in refs}
    found, offset = [], 0
    for p in engine.fp16_groups[number]:
        part, whole = p.partition_numel(), p.ds_numel
        bounds = tuple(min(i * part, whole) for i in range(processes.size + 1))
        ref = by_id[id(p)]
        found.append((ref, _checked(ShardRange(ref.shape, bounds, offset, processes), flat, p.ds_tensor, 0)))
        offset += part  # also where this process's part is short: the flat tensor is padded
    return found


def _zero12(flat: Tensor, refs: list[ParamRef]) -> list[tuple[ParamRef, ShardRange]]:
    """ZeRO 1, 2 and BF16_Optimizer: the 16-bit parameters are views into one buffer, which is cut into equal parts.

    ``_hp_mapping`` would tell this too, but wrongly under ``round_robin_gradients``.
    """
    trained = [m for m in refs if m.parameter.requires_grad]
    processes = ProcessGroup.for_tensors_on(flat.device, trained[0].parameter._dp_group)  # type: ignore[attr-defined]
    part = flat.numel()
    found = []
    for ref in sorted(trained, key=lambda m: m.parameter.storage_offset()):
        begin, numel = int(ref.parameter.storage_offset()), math.prod(ref.shape)
        bounds = tuple(min(max(i * part - begin, 0), numel) for i in range(processes.size + 1))
        start = bounds[processes.index]
        offset = begin + start - processes.index * part if bounds[processes.index + 1] > start else 0
        held = ShardRange(ref.shape, bounds, offset, processes)
        found.append((ref, _checked(held, flat, ref.parameter.detach().reshape(-1), start)))
    return found


def _checked(held: ShardRange, flat: Tensor, weights: Tensor, start: int) -> ShardRange:
    """``held``, if this process's part of the flat tensor holds the weights that it should."""
    if held.numel and not weights.is_meta:
        own = held.of(flat.detach())
        expected = weights.narrow(0, start, held.numel)
        if not torch.equal(own.to(expected.dtype), expected.to(own.device)):
            raise UnsupportedLayout(
                f"DeepSpeed's flat partition does not hold the parameter of shape {held.shape} where it should; this "
                "DeepSpeed lays them out in another way than 0.19 does"
            )
    return held
