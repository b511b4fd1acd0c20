"""Whether a model keeps the examples of one block apart, seen from what it computes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput

FIRST, SECOND = 5, 7  # tokens of two examples in a block


def takes_positions(model: Any) -> bool:
    """Whether positions reach the model at all: the Trainer hands on what its ``forward`` names."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(base.forward).parameters


@torch.no_grad()
def leaks(model: nn.Module, vocabulary: int, device: torch.device) -> bool:
    """Whether what a block holds first changes what the model says of the example behind it. Two rows, as batches have
    several."""
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, FIRST + SECOND), generator=generator)
    other = tokens.clone()
    other[:, :FIRST] = (tokens[:, :FIRST] + 1) % vocabulary
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)]).expand(2, -1)
    one, two = (_logits(model, each.to(device), positions.to(device))[:, -SECOND:] for each in (tokens, other))
    model.train(was_training)
    return bool((one - two).abs().max() > 1e-3 * one.abs().max())


def _logits(model: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return logits.float()


def check_packing(model: Any, vocabulary: int, device: torch.device) -> None:
    """Refuse to pack for a model in which examples would see each other.

    Raises:
        BadInput: for such a model.
    """
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    if not takes_positions(model) or leaks(model, vocabulary, device):
        raise BadInput(f"packing: in a {kind} the examples of a block see each other; leave packing out")
