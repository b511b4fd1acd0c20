"""The blocks of a transformer and the layers in them, by the names that model families give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ..optim.distributed import full_shape
from ..target_modules import ATTENTION_PARTS, ROUTERS, experts_of

ATTENTION, MLP, NORM = "attention", "mlp", "norm"
# Layers that hold several of the matrices that other families keep apart.
FUSED = {"qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "gate_up_proj"}


class Part(NamedTuple):
    """A layer of a block: its whole name, what it belongs to, and its parameters, the weight first."""

    name: str
    kind: str
    parameters: tuple[Tensor, ...]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def weight(self) -> Tensor:
        return self.parameters[0]


def blocks_of(model: nn.Module) -> dict[str, list[Part]]:
    """The matrices and norms of each block, by the block's name, such as ``model.layers.3``, in the model's order.

    Raises:
        ValueError: for a model without blocks, which are numbered modules.
    """
    found: dict[str, list[Part]] = {}
    for name, module in model.named_modules():
        block = _block_of(name)
        if block is None or block == name:
            continue
        found.setdefault(block, []).extend(_parts(name, module, block))
    found = {block: parts for block, parts in found.items() if parts}
    if not found:
        raise ValueError("the model has no numbered blocks with matrices, such as model.layers.0; choose masks by hand")
    return found


def _block_of(name: str) -> str | None:
    """The part of a name up to its first number."""
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if numbered is None else ".".join(parts[: numbered + 1])


def _parts(name: str, module: nn.Module, block: str) -> Iterator[Part]:
    weight = module._parameters.get("weight")
    within = name.removeprefix(block)
    attention = any(part in within for part in ATTENTION_PARTS)
    for whole, p in experts_of(name, module):
        yield Part(whole, MLP, (p,))
    if weight is None or within.rpartition(".")[2] in ROUTERS:
        return
    own = tuple(p for p in (weight, module._parameters.get("bias")) if p is not None)
    if "norm" in type(module).__name__.lower():
        yield Part(name, NORM, own)
    elif len(full_shape(weight)) == 2 and not isinstance(module, nn.Embedding):
        yield Part(name, ATTENTION if attention else MLP, own)
