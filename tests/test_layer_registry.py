"""Which layer a parameter belongs to, whatever has become of the parameter."""

import copy
import gc

import torch
from torch import nn

from gracile.layer_registry import _registered, parts_among
from gracile.models.layers import LowRankLinear


def names(layer):
    found = parts_among(layer.parameters())
    assert all(part.layer is layer for part in found.values())
    return sorted(part.name for part in found.values())


def test_layers_are_found_by_their_parameters():
    layer = LowRankLinear(6, 5, rank=2)
    assert names(layer) == ["A", "B", "bias"]
    assert names(copy.deepcopy(layer)) == ["A", "B", "bias"]
    assert parts_among(nn.Linear(3, 4).parameters()) == {}


def test_also_when_their_parameters_were_replaced():
    layer = LowRankLinear(6, 5, rank=2, device="meta").to_empty(device="cpu")
    assert names(layer) == ["A", "B", "bias"]
    layer.load_state_dict({name: torch.ones_like(p) for name, p in layer.state_dict().items()}, assign=True)
    assert names(layer) == ["A", "B", "bias"]
    assert names(layer.double()) == ["A", "B", "bias"]


def test_layers_are_not_kept():
    before = len(_registered)
    layer = LowRankLinear(6, 5, rank=2)
    assert len(_registered) == before + 1
    del layer
    gc.collect()
    assert len(_registered) <= before
