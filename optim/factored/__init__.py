"""Optimizers for models with factored layers: one paper a file."""
