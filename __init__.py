"""gracile: low-rank and sparse training of large language models."""

__version__ = "0.1.0"
