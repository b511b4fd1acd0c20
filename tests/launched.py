"""Real processes of a run: how launchers start them, which they are, and file systems of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from pool import free_port

CONFIGS = Path(__file__).parents[1] / "configs" / "deepspeed"


def launched(name: str, *arguments: str) -> list[str]:
    """The command that starts a module on two processes: by ``torchrun``, or by DeepSpeed as ``zero2`` or ``zero3``."""
    if name == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
        return [*command, f"--master-port={free_port()}", "-m", *arguments]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), "--module", *arguments]
    return [*command, "--deepspeed", str(CONFIGS / f"{name}.json")]


def launcher_of(pid: int) -> int:
    """The process that has started the ranks. (``deepspeed`` starts another, and passes no SIGTERM on to it.)"""
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        if "deepspeed.launcher.launch" in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
            return child
    return pid


def processes_of(folder: Path) -> dict[int, str]:
    """Those with the folder among the words of their command, and what their environment was."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in (process / "cmdline").read_text().split("\0"):
                found[int(process.name)] = (process / "environ").read_text()
        except OSError:
            continue
    return found


def ranks_of(folder: Path) -> list[int]:
    """The processes that train into a folder, and not those that launched them."""
    return [process for process, environment in processes_of(folder).items() if "\0RANK=" in environment]


def can_mount(folder: Path) -> bool:
    """Whether a file system can be mounted, in a namespace of its own."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0
