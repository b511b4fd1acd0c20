"""Shards: what this process holds of a parameter, and the same arithmetic on it for every layout.

``full`` is a parameter held entirely by one process: plain PyTorch and DistributedDataParallel. ``flat`` and ``matrix``
are slices of one: DeepSpeed ZeRO and FSDP2. ``param_registry`` finds out which.
"""

from . import blocked
from .blocked import Block, BlockedUpdate, WrittenUpdate, block_of, blocks, is_large, squares_in_blocks
from .experts import APART, Expert, Experts
from .flat import FlatShard, all_reduce_shares_
from .full import FullMatrix, FullShard, PendingSolve, Update, has_subspace
from .layout import ParamRef, UnsupportedLayout, full_shape, held_shard, is_dtensor, local_flat
from .made_once import MadeOnce
from .matrix import MatrixShard, RowShard, complete_gradients
from .param_registry import ParamRegistry, PrefixedState
from .partition import Cut, as_one_buffer, by_rows, each_alone, flat_length
from .pieces import PieceOfFull, at_once, pieces_of
from .process_group import ProcessGroup
from .products import matmul
from .projection import PROJ_TYPES, LowRankUpdate, ProjectionSide, add_product_
from .row_view import RowView, complete_rows
from .shard_range import Runs, ShardRange, spans
from .stacks import StackedMatrix, StackedState, stack_of, stacked
from .workspace import Workspace
from .zero_redundancy import wrapped_group

__all__ = [
    "APART",
    "PROJ_TYPES",
    "Block",
    "BlockedUpdate",
    "Cut",
    "Expert",
    "Experts",
    "FlatShard",
    "FullMatrix",
    "FullShard",
    "LowRankUpdate",
    "MadeOnce",
    "MatrixShard",
    "ParamRef",
    "ParamRegistry",
    "PendingSolve",
    "PieceOfFull",
    "PrefixedState",
    "ProcessGroup",
    "ProjectionSide",
    "RowShard",
    "RowView",
    "Runs",
    "ShardRange",
    "StackedMatrix",
    "StackedState",
    "UnsupportedLayout",
    "Update",
    "Workspace",
    "WrittenUpdate",
    "add_product_",
    "all_reduce_shares_",
    "as_one_buffer",
    "at_once",
    "block_of",
    "blocked",
    "blocks",
    "by_rows",
    "complete_gradients",
    "complete_rows",
    "each_alone",
    "flat_length",
    "full_shape",
    "has_subspace",
    "held_shard",
    "is_dtensor",
    "is_large",
    "local_flat",
    "matmul",
    "pieces_of",
    "spans",
    "squares_in_blocks",
    "stack_of",
    "stacked",
    "wrapped_group",
]
