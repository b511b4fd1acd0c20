"""How a command ends when it was one of several processes."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any, NoReturn


def leave(code: int) -> NoReturn:
    """End this process with ``code``, as ``sys.exit`` does; if there is a process group, without the interpreter's own
    shutdown.

    Threads of a process group outlive ``destroy_process_group`` while anything, such as DeepSpeed, still refers to the
    group. One that frees a tensor during the interpreter's shutdown aborts the process ("terminate called without an
    active exception"), and a run that has saved everything would count as failed. Exit handlers still run, and
    non-daemon threads are joined.
    """
    distributed: Any = sys.modules.get("torch.distributed")  # not imported here: then there is no process group
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
