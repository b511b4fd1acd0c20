"""``gracile pretrain`` into a folder that is a small file system of its own, on the processes of a pool's job.

small_disk.py FOLDER LEFT ARGUMENTS..., whose output directory is FOLDER/run; what it holds in the end is copied to
LEFT, for the file system goes with the processes.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gracile.train.engines.process_exit import leave
from gracile.train.pretrain import main

SIZE = "1300k"
USERS, MOUNTS = 0x10000000, 0x00020000  # CLONE_NEWUSER and CLONE_NEWNS
libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(folder: str) -> None:
    user, group = os.getuid(), os.getgid()
    checked(libc.unshare(USERS | MOUNTS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", folder], check=True)


def join(process: str) -> None:
    """The file systems that another process sees."""
    for kind, flag in (("user", USERS), ("mnt", MOUNTS)):
        with open(f"/proc/{process}/ns/{kind}") as opened:
            checked(libc.setns(opened.fileno(), flag))


if __name__ == "__main__":
    folder, left, *arguments = sys.argv[1:]
    told = Path(f"{left}.pid")
    if os.environ["RANK"] == "0":
        mount(folder)
        told.with_suffix(".new").write_text(str(os.getpid()))
        told.with_suffix(".new").rename(told)
    else:
        while not told.exists():
            time.sleep(0.01)
        join(told.read_text())
    code = main(arguments)
    if os.environ["RANK"] == "0":
        shutil.copytree(Path(folder, "run"), left)
    leave(code)
