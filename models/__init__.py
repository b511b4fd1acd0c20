"""Models: the LLaMA size ladder of the low-rank pretraining papers, the layers that replace theirs, conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .llama import SIZES, build_llama, llama_config

__all__ = ["SIZES", "build_llama", "llama_config"]


def __getattr__(name: str) -> Any:
    """The names above, imported when they are asked for: ``gracile.models.layers`` needs no transformers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import llama

    return getattr(llama, name)
