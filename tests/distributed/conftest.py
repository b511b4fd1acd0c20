"""Launch real processes on loopback, with a time limit, and leave none behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pool import free_port


@pytest.fixture(scope="session")
def torchrun():
    """The real launcher. What is not about it runs in the pool."""

    def launch(ranks: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", *arguments]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return subprocess.CompletedProcess(command, process.returncode, out)

    return launch


def pytest_collection_modifyitems(items):
    """Starting processes is slow, more so on a busy machine, and the first test of a module waits for all of them."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))
