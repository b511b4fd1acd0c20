"""A run: trainer, checkpoints, report."""
