"""One line for what the machine does to a run: a full disk, a folder that went away, a process that ended."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

# What torch says where it writes a file, and where another process has gone; not all of it has a class of its own.
WRITER = ("PytorchStreamWriter", "inline_container.cc")
LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")


def explained(error: Exception) -> str | None:
    """What has happened, or None for an error that is no fault of the machine's."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f" ({error.filename})"
        return f"the machine refused a file: {error.strerror}{where}"
    text = " ".join(str(error).split())
    if type(error) is Exception and "(os error " in text:  # of the tokenizers, which have no class for it either
        return f"the machine refused a file: {text.split(' (os error ')[0]}"
    if isinstance(error, SafetensorError):
        return f"a file of weights could not be written or read: {text}"
    if isinstance(error, (RuntimeError, OSError)):
        if any(word in text for word in WRITER):
            return f"a file of a checkpoint could not be written: {text.split('. ', 1)[-1]}; is the disk full?"
        if is_lost(error):
            return "another process of the run has ended, or cannot be reached"
    return None


def is_lost(error: Exception) -> bool:
    """Whether another process has gone, which can happen wherever processes speak with each other."""
    if type(error).__name__ in ("DistNetworkError", "DistStoreError"):  # of the store that the first process holds
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error) for word in LOST)


def what_stays(output_dir: Path | None) -> str:
    """Where the run can go on from; None for one whose configuration was not read yet."""
    from . import checkpoints

    if output_dir is None:
        return "nothing had begun"
    kept = checkpoints.newest_whole(output_dir, sizes_only=True)[0]
    if kept is None:
        return "no checkpoint had been saved"
    return f"{kept} is whole: go on with the same command and --resume_from_checkpoint true"
