"""What a fine-tuning did to a matrix: spectral measures of a pair (W0, W1), or of W0 and a low-rank update.

Sources: LoRA vs Full Fine-tuning (Shuttleworth et al. 2024, arXiv:2410.21228) for intruder dimensions; The Path Not
Taken (Zhu et al. 2025, arXiv:2511.08567) for spectral drift, principal angles and the masks of an update.
"""

from .compare import Measures, compare
from .measures import principal_angles, ranks_of
from .update import LowRankUpdate

__all__ = ["LowRankUpdate", "Measures", "compare", "principal_angles", "ranks_of"]
