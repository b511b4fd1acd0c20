"""Shards: what this process holds of a parameter, and the same arithmetic on it for every layout.

``whole`` is a parameter held entirely by one process: plain PyTorch and DistributedDataParallel. ``sliced`` is a range
of one: DeepSpeed ZeRO and FSDP2. ``layout`` finds out which.
"""

from .full import FullMatrix, FullShard, Solving, has_subspace
from .layout import ParamRef, PrefixedState, UnsupportedLayout, flat_tensors, full_shape, held_shard, pieces_of, rows_of
from .partition import Cut, as_one, by_rows, each, flat_length
from .process_group import ProcessGroup
from .sliced import FlatShard, MatrixShard, RowShard, ShardRange, complete, put_together, sum_together_

__all__ = [
    "Cut",
    "FlatShard",
    "FullMatrix",
    "FullShard",
    "MatrixShard",
    "ParamRef",
    "PrefixedState",
    "ProcessGroup",
    "RowShard",
    "ShardRange",
    "Solving",
    "UnsupportedLayout",
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
