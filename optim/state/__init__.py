"""Tensors of state: declared, made, loaded, planned, stored in fewer bits."""
