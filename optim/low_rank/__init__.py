"""Optimizers whose moments live in a subspace of each matrix: one paper a file."""
