"""Process groups for tests, without the start of an interpreter for each process.

Two servers import torch, DeepSpeed, transformers and the trainer once. Each process of a job is forked from one of
them: it has what they imported and nothing of an earlier job. Even ranks come from one server and odd ranks from the
other, so that two processes differ in their hash seeds and addresses, as those of ``torchrun`` do. A job is a command,
as ``torchrun`` takes it, or a function and its arguments:

    pool.run(2, "-m", "gracile.train.pretrain", "run.yaml")     # -> subprocess.CompletedProcess
    pool.call(4, "cells:measure", cells)                        # -> what it returns on rank 0

A job that takes too long is told to print where it is, and killed. A rank that fails ends its job. The servers end, and
kill what they have forked, when the other end of their pipe is closed, however that comes about.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import itertools
import os
import pickle
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
IMPORTED = (
    "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.nn.parallel", "torch.profiler",
    "torch.utils.tensorboard", "deepspeed", "transformers", "transformers.models.llama.modeling_llama",
    "transformers.integrations.deepspeed", "accelerate.utils.deepspeed", "datasets", "matplotlib.pyplot",
    "safetensors.torch", "gracile.optim", "gracile.models", "gracile.train.pretrain", "gracile.train.profile",
    # what those import when they are first used
    "torch.distributed.algorithms.ddp_comm_hooks", "torch.distributed.checkpoint.state_dict", "setuptools", "scipy.io",
    "datasets.packaged_modules.generator.generator", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.zero.muon.muon_optimizer", "gracile.train.run.trainer",
)  # fmt: skip
GRACE = 5.0  # seconds in which the ranks beside a failed one may say what they saw


def free_port() -> int:
    while True:
        # below those that systems give to outgoing connections; not by ``random``, which runs seed: tests side by side
        # would draw the same one while neither listens yet
        port = 20000 + secrets.randbelow(12000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class RanksFailed(AssertionError):
    """A job did not end well; the text is what its processes said."""


# ---- the side of the tests ------------------------------------------------------------------------------------------


class Pool:
    """The two servers, started when the first job comes."""

    def __init__(self, imported: tuple[str, ...] = IMPORTED, patience: float = 0.0) -> None:
        """``patience``: seconds that what a rank has started may live after it, before it counts as left behind."""
        self.imported, self.patience = imported, patience
        self.folder = tempfile.TemporaryDirectory(prefix="gracile-pool-")
        self.servers: list[tuple[subprocess.Popen, Connection]] = []
        self.numbers = itertools.count()
        self.jobs: dict[int, Job] = {}

    def start(self, ranks: int, *argv: str, target: tuple[str, tuple] | None = None) -> Job:
        """A job that runs while the tests go on."""
        if not self.servers:
            self.servers = [self._server(name) for name in ("even", "odd")]
        job = Job(self, next(self.numbers), ranks)
        self.jobs[job.number] = job
        common = {"argv": argv, "target": target, "cwd": os.getcwd(), "job": job.number, "folder": str(job.folder)}
        common["patience"] = self.patience
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        for rank in range(ranks):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.servers[rank % 2][1].send({**common, "rank": rank, "environment": own})
        return job

    def run(self, ranks: int, *argv: str, timeout: float = 300) -> subprocess.CompletedProcess:
        """A command's exit code, 0 where that of all ranks is, and what they printed."""
        job = self.start(ranks, *argv)
        code = job.wait(timeout)
        return subprocess.CompletedProcess(argv, code, job.output())

    def call(self, ranks: int, function: str, *arguments: Any, timeout: float = 300) -> Any:
        """What ``module:function`` returns on rank 0."""
        job = self.start(ranks, target=(function, arguments))
        code = job.wait(timeout)
        if code != 0:
            raise RanksFailed(f"{function} on {ranks} ranks ended with {code}\n{job.output()[-6000:]}")
        return pickle.loads((job.folder / "result").read_bytes())

    def close(self) -> None:
        self._stop()
        self.folder.cleanup()

    def _stop(self) -> None:
        for _, connection in self.servers:
            connection.close()
        for process, _ in self.servers:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.servers = []

    def _server(self, name: str) -> tuple[subprocess.Popen, Connection]:
        ours, theirs = Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        log = Path(self.folder.name) / f"{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *self.imported],
                env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        theirs.close()
        return process, ours

    def _listen(self, seconds: float) -> None:
        """Take in what the servers say of any job."""
        for connection in wait([connection for _, connection in self.servers], seconds):
            try:
                number, rank, code, left = connection.recv()
            except (EOFError, ConnectionResetError):
                logs = "\n".join(path.read_text()[-3000:] for path in Path(self.folder.name).glob("*.log"))
                self._stop()
                raise RanksFailed(f"a server of the pool has ended\n{logs}") from None
            if number in self.jobs:
                self.jobs[number].codes[rank] = code
                self.jobs[number].left |= {rank} if left else set()

    def _signal(self, number: int, which: int, rank: int | None = None) -> None:
        for _, connection in self.servers:
            connection.send((number, which, rank))


class Job:
    def __init__(self, pool: Pool, number: int, ranks: int) -> None:
        self.pool, self.number, self.ranks = pool, number, ranks
        self.codes: dict[int, int] = {}
        self.left: set[int] = set()  # ranks that have left processes behind
        self.folder = Path(pool.folder.name) / str(number)
        self.folder.mkdir()

    def ended(self) -> bool:
        self.pool._listen(0)
        return len(self.codes) == self.ranks

    def wait(self, timeout: float = 300) -> int:
        """0, or the exit code of the rank that failed first."""
        deadline = time.monotonic() + timeout
        try:
            while len(self.codes) < self.ranks:
                left = deadline - time.monotonic()
                if left <= 0:
                    return self._stopped()
                before = self._failed()
                self.pool._listen(min(left, 60))
                if before != self._failed():
                    deadline = min(deadline, time.monotonic() + GRACE)
            return self._failed()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL to all processes, those that ranks started included."""
        with contextlib.suppress(OSError):
            self.pool._signal(self.number, signal.SIGKILL)
            while self.pool.servers and len(self.codes) < self.ranks:
                self.pool._listen(1)

    def signal(self, which: int, rank: int) -> None:
        """A signal to one of the processes alone."""
        self.pool._signal(self.number, which, rank)

    def output(self) -> str:
        """What the ranks printed, one after the other."""
        paths = [self.folder / f"{rank}.log" for rank in range(self.ranks)]
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def _failed(self) -> int:
        return next((code for code in self.codes.values() if code), 0)

    def _stopped(self) -> int:
        """Too late, or some rank has failed and others have not ended since."""
        code = self._failed()
        if not code:
            self.pool._signal(self.number, signal.SIGABRT)  # faulthandler prints where each thread is
            until = time.monotonic() + 2
            while len(self.codes) < self.ranks and time.monotonic() < until:
                self.pool._listen(0.2)
        self.kill()
        return code or -signal.SIGALRM


# ---- the servers ----------------------------------------------------------------------------------------------------


def serve(connection: Connection, imported: list[str]) -> None:
    """Fork a process for each request, and tell when it has ended."""
    prepare(imported)
    running: dict[int, tuple[int, int]] = {}  # of a process -> its job and rank
    patience: dict[int, float] = {}
    try:
        while True:
            if connection.poll(0.01 if running else None):
                request = connection.recv()
                if isinstance(request, dict):
                    pid = os.fork()
                    if pid == 0:
                        connection.close()
                        become(request)
                    running[pid], patience[pid] = (request["job"], request["rank"]), request["patience"]
                else:
                    number, which, only = request
                    for pid, (job, rank) in list(running.items()):
                        if job == number and only is None:
                            _signal_group(pid, which)
                        elif (job, rank) == (number, only):
                            os.kill(pid, which)
            while running:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                left = _group_outlives(pid, patience.pop(pid))
                _signal_group(pid, signal.SIGKILL)  # what it started and left
                connection.send((*running.pop(pid), os.waitstatus_to_exitcode(status), left))
    except (EOFError, OSError):
        for pid in running:
            _signal_group(pid, signal.SIGKILL)


def prepare(imported: list[str]) -> None:
    """What every job finds done."""
    sys.path.insert(0, str(TESTS / "distributed"))
    for name in imported:
        importlib.import_module(name)
    if "deepspeed" in imported:
        from deepspeed.utils import numa

        numa.get_numa_cores = functools.cache(numa.get_numa_cores)  # starts a program, often
    if "gracile.train.pretrain" in imported:
        from gracile.train.run import report

        # a third of a short run; a test of the real launcher sees that it is drawn
        report.plot_losses = lambda folder, *rest: (folder / "loss.png").write_bytes(b"")
    gc.collect()
    gc.freeze()


def _group_outlives(pid: int, seconds: float) -> bool:
    """Whether what an ended process has started is still there after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return False
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.05)


def _signal_group(pid: int, which: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, which)
    if which != signal.SIGABRT:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, which)  # where it has no group of its own yet


def become(request: dict[str, Any]) -> None:
    """Be one rank of a job, to the end of the process."""
    code = 1
    try:
        os.setsid()
        log = os.open(f"{request['folder']}/{request['rank']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        code = _command(list(request["argv"])) if request["target"] is None else _function(request)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _command(argv: list[str]) -> int:
    """As ``python argv`` does."""
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            sys.modules.pop(argv[1], None)  # it will be __main__
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path.insert(0, str(Path(argv[0]).resolve().parent))
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def _function(request: dict[str, Any]) -> int:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    name, arguments = request["target"]
    module, function = name.split(":")
    result = getattr(importlib.import_module(module), function)(*arguments)
    if request["rank"] == 0:
        Path(request["folder"], "result").write_bytes(pickle.dumps(result))
    if dist.is_initialized():
        dist.barrier()  # rank 0 has the store that others may still need
    return 0


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), sys.argv[2:])
    os._exit(0)
