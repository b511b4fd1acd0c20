"""Shards: what this process holds of a parameter, and the same arithmetic on it for every layout.

``whole`` is a parameter held entirely by one process: plain PyTorch and DistributedDataParallel. ``sliced`` is a range
of one: DeepSpeed ZeRO and FSDP2. ``layout`` finds out which.
"""

from .layout import Keys, Member, UnsupportedLayout, flat_tensors, full_shape, held_shard, pieces_of, rows_of
from .paper import Cut, as_one, by_rows, each, flat_length
from .sliced import Slice, Sliced, SlicedMatrix, SlicedRows, complete, put_together, sum_together_
from .whole import Solving, Whole, WholeMatrix, has_subspace
from .world import World

__all__ = [
    "Cut",
    "Keys",
    "Member",
    "Slice",
    "Sliced",
    "SlicedMatrix",
    "SlicedRows",
    "Solving",
    "UnsupportedLayout",
    "Whole",
    "WholeMatrix",
    "World",
    "as_one",
    "by_rows",
    "complete",
    "each",
    "flat_length",
    "flat_tensors",
    "full_shape",
    "has_subspace",
    "held_shard",
    "pieces_of",
    "put_together",
    "rows_of",
    "sum_together_",
]
