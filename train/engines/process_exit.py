"""How a command ends when it has spoken with other processes."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any, NoReturn


def leave(code: int) -> NoReturn:
    """End this process with ``code``, as ``sys.exit`` does, but without tearing the interpreter down where there is a
    process group.

    Threads of a process group outlive ``destroy_process_group`` while anything, DeepSpeed for one, still refers to the
    group. One that lets go of a tensor when the interpreter is half gone aborts the process ("terminate called without
    an active exception"), and a run that has saved everything would count as failed. What others have registered for
    the exit is done first, and threads that must be waited for are.
    """
    distributed: Any = sys.modules.get("torch.distributed")  # not imported: nobody spoke
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
