"""Every example runs as its docstring says. Each asserts what it shows: a falling loss, an equal resumed run, ..."""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LOSSES = re.compile(r"loss (\d+\.\d+) -> (\d+\.\d+)")
SECONDS = 240  # of a launch, on a machine that is busy

# One process: what the last line must say.
ALONE = {
    "plain_loop": "the resumed run equals the uninterrupted one, to the bit",
    "trainer_optimizers": "resumed from checkpoint-10 to the same bits",
    "trainer_optimizer_class": "a subclass gives the same: True",
    "rigl": "it computes the same",
    "finetune_adapter": "saved, loaded, written as LoRA and merged, it computes the same",
    "sltrain": "merged into plain linear layers that compute the same",
}
# Two processes: how they are launched, and a part of what the first one prints.
LAUNCHED = {
    "deepspeed_zero": (("deepspeed", "--num_accelerators", "2", "--master_port"), "bytes of state"),
    "fsdp2": (("torchrun", "--nproc-per-node", "2", "--master-port"), "in one alone"),
}


def assert_fell(printed):
    first, last = map(float, LOSSES.search(printed).groups())
    assert last < first


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*ALONE, *LAUNCHED}


@pytest.mark.parametrize("name", [*ALONE, *LAUNCHED])
def test_an_example_is_short_and_names_its_command(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    command = "python" if name in ALONE else LAUNCHED[name][0][0]
    assert re.search(rf"^    {command} .*\b{name}\.py", source, re.MULTILINE)


@pytest.mark.parametrize("name", ALONE)
def test_an_example_of_one_process_runs(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert ALONE[name] in printed.splitlines()[-1]
    assert_fell(printed)


@pytest.mark.parametrize("name", LAUNCHED)
def test_an_example_of_two_processes_runs(name, tmp_path, pool, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = pool.run(2, str(EXAMPLES / f"{name}.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    assert LAUNCHED[name][1] in done.stdout
    assert_fell(done.stdout)


@pytest.mark.thorough  # other tests have these launchers
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("name", LAUNCHED)
def test_so_it_does_under_its_launcher(name, tmp_path):
    (program, *options), printed_part = LAUNCHED[name]
    command = [str(Path(sys.executable).with_name(program)), *options, str(free_port())]
    process = subprocess.Popen(
        [*command, str(EXAMPLES / f"{name}.py"), str(tmp_path)],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:  # the launcher and all that it started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, printed[-3000:]
    assert printed_part in printed
    assert_fell(printed)
