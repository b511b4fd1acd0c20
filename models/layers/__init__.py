"""Linear layers whose weight is made of other parameters: one a file."""

from ..core.factored_linear import FactoredLinear
from ..inference.block_sparse import BlockSparseLinear
from ..inference.condensed import CondensedLinear, CSRLinear, InferenceLinear
from ..inference.semi_structured import SemiStructuredLinear
from .iso_flop import DopedLinear, FactorisedLinear, IsoFlopLinear, ParallelLinear
from .low_rank import LowRankLinear
from .n_m import NMLinear
from .ordered_low_rank import OrderedLowRankLinear
from .relora import ReLoRALinear
from .scaled import ScaledLinear
from .sparse_low_rank import SparseLowRankLinear
from .spectral import SpectralLinear
from .threshold import ThresholdLinear

__all__ = [
    "BlockSparseLinear",
    "CSRLinear",
    "CondensedLinear",
    "DopedLinear",
    "FactoredLinear",
    "FactorisedLinear",
    "InferenceLinear",
    "IsoFlopLinear",
    "LowRankLinear",
    "NMLinear",
    "OrderedLowRankLinear",
    "ParallelLinear",
    "ReLoRALinear",
    "ScaledLinear",
    "SemiStructuredLinear",
    "SparseLowRankLinear",
    "SpectralLinear",
    "ThresholdLinear",
]
