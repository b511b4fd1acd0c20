"""Shards: what this process holds of a parameter, and the same arithmetic on it for every layout.

``whole`` is a parameter held entirely by one process: plain PyTorch and DistributedDataParallel.
"""

from .whole import UnsupportedLayout, Whole, WholeMatrix, shard_of

__all__ = ["UnsupportedLayout", "Whole", "WholeMatrix", "shard_of"]
