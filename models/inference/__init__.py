"""Layers that a trained sparse model is exported to."""
