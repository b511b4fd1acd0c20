"""Subspaces: where the moments of a matrix live, and how they are found."""
