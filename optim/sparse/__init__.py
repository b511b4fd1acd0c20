"""Optimizers that train some weights of each matrix: one paper a file."""
