"""A command that has spoken with other processes ends without tearing the interpreter down, and loses nothing."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys, threading, time
import torch.distributed as dist
from gracile.train.engines.process_exit import leave

class Torn:
    def __del__(self):  # a module's globals go when the interpreter does
        print("torn down")

torn = Torn()
if {group}:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(lambda: print("handler"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("said", end="")
leave({code})
"""


@pytest.mark.parametrize(("group", "code"), [(True, 2), (False, 0)])
def test_everything_is_said_and_done_before_the_end(group, code):
    script = SCRIPT.format(group=group, code=code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith("saidthread\nhandler\n"), done.stdout
    assert ("torn down" in done.stdout) is not group
