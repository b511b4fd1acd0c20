"""Linear layers whose weight is made of other parameters: one a file."""

from .base import FactoredLinear
from .low_rank import LowRankLinear
from .ordered_low_rank import OrderedLowRankLinear
from .relora import ReLoRALinear
from .sparse_low_rank import SparseLowRankLinear
from .spectral import SpectralLinear

__all__ = [
    "FactoredLinear",
    "LowRankLinear",
    "OrderedLowRankLinear",
    "ReLoRALinear",
    "SparseLowRankLinear",
    "SpectralLinear",
]
