"""Kinds of memory, planned and measured under the same names."""

from __future__ import annotations

from ...optim.memory import ERRORS, INDICES, MOMENTS, PROJECTORS

WEIGHTS, MASTER, GRADIENTS, BUFFERS = "weights", "master weights", "gradients", "buffers"
ACTIVATIONS, TEMPORARY = "activations", "temporary"
STATE = (MOMENTS, PROJECTORS, ERRORS, INDICES)
KINDS = (WEIGHTS, MASTER, GRADIENTS, *STATE, BUFFERS, ACTIVATIONS, TEMPORARY)
