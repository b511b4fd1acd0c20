"""8-bit state: any rule's moments as codes in blocks of 256, through bitsandbytes (Dettmers et al. 2022,
arXiv:2110.02861). A storage type, not a rule: moments are opened, the rule runs in fp32, and they are closed again."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .rules import Rule, Shape

BLOCK = 256  # elements that share one scale
SMALLEST = 4096  # tensors with fewer elements stay fp32, as in bitsandbytes


def block_wise(rule: Rule) -> Rule:
    """``rule`` with its moments held in 8 bits: ``exp_avg`` as uint8 codes and ``exp_avg_absmax`` as fp32 scales."""

    def state(shape: Shape, dtype: torch.dtype, device: torch.device, group: dict[str, Any]) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        for key, moment in rule.state(shape, torch.float32, torch.device("meta"), group).items():
            if moment.numel() < SMALLEST:
                held[key] = torch.zeros(moment.shape, dtype=torch.float32, device=device)
            else:
                held[key] = torch.zeros(moment.shape, dtype=torch.uint8, device=device)
                blocks = math.ceil(moment.numel() / BLOCK)
                held[f"{key}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=device)
        return held

    def direction(gradient: Tensor, state: MutableMapping[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, float]:
        closed = [key for key in state if f"{key}_absmax" in state]
        wide = {**state, **{key: opened(state, key) for key in closed}}
        N, correction = rule.direction(gradient, wide, group)
        for key in closed:
            close(wide[key], state, key)
        return N, correction

    return Rule(rule.check, state, direction, rule.decay_first)


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


def opened(state: MutableMapping[str, Tensor], key: str) -> Tensor:
    """The moment that ``state`` holds as codes under ``key``, in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    codes, absmax = state[key], state[f"{key}_absmax"]
    values: Tensor = dequantize_blockwise(codes, absmax=absmax, code=_code_of(key, codes.device), blocksize=BLOCK)
    return values


def close(values: Tensor, state: MutableMapping[str, Tensor], key: str) -> None:
    """Write ``values`` (fp32) into ``state`` as codes under ``key``."""
    from bitsandbytes.functional import quantize_blockwise

    codes, scales = quantize_blockwise(values, code=_code_of(key, values.device), blocksize=BLOCK)
    state[key].copy_(codes)
    state[f"{key}_absmax"].copy_(scales.absmax)
