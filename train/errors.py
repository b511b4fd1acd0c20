"""Errors that end a command with one line instead of a traceback."""


class BadInput(Exception):
    """Something the user gave cannot be used. Names the field, the value and the way out. Exit code 2."""


class RunStopped(Exception):
    """A run that had to stop. Says at which step, why, and what stays. Exit code 1."""


class CannotLoad(BadInput):
    """A file that this process could not load, and that others may have loaded: each process says it for itself."""
