"""Linear layers that store less than their weight: one a file."""

from .base import FactoredLinear
from .low_rank import LowRankLinear
from .sparse_low_rank import SparseLowRankLinear

__all__ = ["FactoredLinear", "LowRankLinear", "SparseLowRankLinear"]
