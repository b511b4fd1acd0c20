"""Training a part of a dense model's weights, the others frozen at their values: no layers, no new training code.

    groups = selection_groups(model, "s2ft", down_ratio=0.02)
    optimizer = SparseAdamW(groups, lr=1e-4)

A method says which weights, as parameter groups for the package's masked optimizer, or, where whole matrices are
chosen, for any optimizer. What was trained is saved as a sparse delta, merged and undone to the bit.
"""

from ..optim.sparse.selected import Below, Columns, Entries, Rows
from .delta import Delta, load_delta, merge_delta, save_delta, undo_delta
from .hft import HFT
from .nuclear import NuclearPenalty
from .registry import METHODS, selection_groups
from .s2ft import S2FT
from .sara import SaRA, threshold_of

__all__ = [
    "HFT",
    "METHODS",
    "S2FT",
    "Below",
    "Columns",
    "Delta",
    "Entries",
    "NuclearPenalty",
    "Rows",
    "SaRA",
    "load_delta",
    "merge_delta",
    "save_delta",
    "selection_groups",
    "threshold_of",
    "undo_delta",
]
