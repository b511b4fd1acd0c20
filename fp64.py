"""Devices without fp64, as Apple's MPS: what needs it is computed on the CPU there.

MPS has been pretended only, in the tests: no step was ever run on it.
"""

from __future__ import annotations

import torch

WITHOUT_FP64 = {"mps"}  # types of devices


def has_fp64(device: torch.device) -> bool:
    return device.type not in WITHOUT_FP64


def widest(device: torch.device) -> torch.dtype:
    """The widest floats of a device: for sums of which the last bits of fp32 do not matter."""
    return torch.float64 if has_fp64(device) else torch.float32


def fp64_device(device: torch.device) -> torch.device:
    """Where what needs fp64 is computed for a device: on itself, or else on the CPU."""
    return device if has_fp64(device) else torch.device("cpu")
