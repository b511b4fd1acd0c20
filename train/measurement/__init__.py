"""Planned and measured memory, time and traffic."""
