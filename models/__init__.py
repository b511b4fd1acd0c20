"""Models: the LLaMA size ladder of the low-rank pretraining papers."""

from .llama import SIZES, build_llama, llama_config

__all__ = ["SIZES", "build_llama", "llama_config"]
