"""Ctrl-C, SIGTERM and full disks, on real processes: each says what has happened in one line, and the run goes on to
the losses and weights of one that was never disturbed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import same, weights
from pool import free_port

from gracile.train.run import checkpoints

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
STEPS = 30
COMMAND = ["-m", "gracile.train.pretrain"]
RESUME = ["--resume_from_checkpoint", "auto"]


@pytest.fixture
def run(tiny):
    """Arguments of a run whose logs and checkpoints do not fall on the same steps."""
    path = tiny(max_steps=STEPS, save_steps=9, logging_steps=4, gradient_accumulation_steps=1)
    return lambda folder, *more: [*COMMAND, path, "--output_dir", str(folder), *more]


def until(there, process_ended, seconds=120):
    deadline = time.monotonic() + seconds
    while not there():
        assert not process_ended(), "it ended before"
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


def told(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def step_of(line):
    return int(re.search(r"after step (\d+); ", line)[1])


def lines_of(output):
    return [line for line in output.splitlines() if line.startswith("gracile pretrain:")]


@pytest.mark.parametrize(
    ("which", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.thorough)]
)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_losses(pool, run, tmp_path, which, code):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert pool.run(1, *run(whole, *RESUME)).returncode == 0, "auto begins where there is nothing"
    job = pool.start(1, *run(broken))
    until((broken / "checkpoint-9" / "complete.json").exists, job.ended)
    job.signal(which, 0)
    assert job.wait() == code
    (line,) = lines_of(job.output())
    saved = broken / f"checkpoint-{step_of(line)}"
    assert checkpoints.fault(saved) is None
    assert line == (
        f"gracile pretrain: stopped by {which.name} after step {step_of(line)}; {saved} is whole: "
        "go on with the same command and --resume_from_checkpoint true"
    )
    assert "Traceback" not in job.output()
    assert pool.run(1, *run(broken, *RESUME)).returncode == 0, "auto goes on where there is something"
    assert told(broken)["history"] == told(whole)["history"]
    assert same(weights(broken), weights(whole))


def test_two_processes_stop_together_though_one_has_heard(pool, run, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert pool.run(2, *run(whole)).returncode == 0
    job = pool.start(2, *run(broken))
    until((broken / "checkpoint-9" / "complete.json").exists, job.ended)
    job.signal(signal.SIGTERM, 1)
    assert job.wait() == 143
    assert job.codes == {0: 143, 1: 143}
    assert len(lines_of(job.output())) == 1
    assert pool.run(2, *run(broken, *RESUME)).returncode == 0
    assert told(broken)["history"] == told(whole)["history"]
    assert same(weights(broken), weights(whole))


# ---- a full disk ----------------------------------------------------------------------------------------------------


def can_mount(folder):
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_full_disk_is_one_line_on_every_rank_and_older_checkpoints_stay_whole(pool, tiny, tmp_path, ranks):
    """The run's folder is a file system of its own, in which there is room for some checkpoints."""
    folder, left = tmp_path / "small", tmp_path / "left"
    folder.mkdir()
    if not can_mount(folder):
        pytest.skip("file systems cannot be mounted here")
    config = tiny(max_steps=60, save_steps=5, output_dir=str(folder / "run"), report_to="none")
    job = pool.start(ranks, str(Path(__file__).with_name("small_disk.py")), str(folder), str(left), config)
    assert job.wait() == 1, job.output()[-4000:]
    assert job.codes == dict.fromkeys(range(ranks), 1)
    assert "Traceback" not in job.output(), job.output()[-4000:]
    said = lines_of(job.output())
    assert len(said) == ranks
    assert any("No space left" in line or "is the disk full?" in line for line in said), said
    kept = [path.name for path in checkpoints.checkpoints(left) if checkpoints.fault(path) is None]
    assert len(kept) >= 2
    newest = max(kept, key=lambda name: int(name.split("-")[1]))
    assert all(f"{newest} is whole" in line for line in said), (said, kept)


# ---- launchers ------------------------------------------------------------------------------------------------------


def launched(name, *arguments):
    if name == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
        return [*command, f"--master-port={free_port()}", "-m", *arguments]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), "--module", *arguments]
    return [*command, "--deepspeed", str(CONFIGS / f"{name}.json")]


@pytest.mark.thorough
@pytest.mark.parametrize("whom", ["terminal", "launcher", "one rank"])
@pytest.mark.parametrize("launcher", ["torchrun", "zero2", "zero3"])
def test_launched_processes_stop_together(launcher, whom, run, tmp_path):
    """Ctrl-C reaches all processes from the terminal, and those of a launcher from it once more; a scheduler's SIGTERM
    reaches the launcher alone, or a process alone."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def start(folder, *more):
        log = (tmp_path / "log.txt").open("w")
        command = launched(launcher, *run(folder, *more)[1:])
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)

    assert start(whole).wait(280) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    process = start(broken)
    try:
        until((broken / "checkpoint-9" / "complete.json").exists, lambda: process.poll() is not None)
        if whom == "terminal":
            os.killpg(process.pid, signal.SIGINT)
        elif whom == "launcher":
            os.kill(launcher_of(process.pid), signal.SIGTERM)
        else:
            os.kill(max(ranks_of(broken)), signal.SIGTERM)
        assert process.wait(100) != 0
        assert not ranks_of(broken), "no process is left"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = (tmp_path / "log.txt").read_text()
    (line,) = lines_of(output)
    assert f"after step {step_of(line)}; " in line
    assert checkpoints.fault(broken / f"checkpoint-{step_of(line)}") is None
    assert start(broken, *RESUME).wait(280) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert told(broken)["history"] == told(whole)["history"]
    assert same(weights(broken), weights(whole))


def launcher_of(pid):
    """The process that has started the ranks. (``deepspeed`` starts another, and passes no SIGTERM on to it.)"""
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        if "deepspeed.launcher.launch" in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
            return child
    return pid


def ranks_of(folder):
    """The processes that train into a folder, and not those that launched them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            if str(folder) in words and "\0RANK=" in (process / "environ").read_text():
                found.append(int(process.name))
        except OSError:
            continue
    return found
